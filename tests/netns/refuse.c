/* Has the kernel say no to rtnetlink requests: LD_PRELOADed into flanneld by test_kernel_refuses.py.
 *
 * The file $FLANNEL_REFUSE says what happens now; it may change any time.
 *
 *   (empty)     nothing
 *   caps        CAP_NET_ADMIN is taken away for the send: the kernel's own EPERM
 *   send N      sending fails with errno N
 *   answer N    every request that changes something is answered with errno N; to that end the kernel
 *               gets a message of a type that it does not know, and its EOPNOTSUPP becomes N
 *   address N   the same, but only requests for a new address
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Not in rtnetlink's table: refused with EOPNOTSUPP. */
#define UNKNOWN 0x7ff0

static void order(char *word, int *number)
{
	const char *path = getenv("FLANNEL_REFUSE");
	char text[64] = "";
	int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;

	*number = 0;
	word[0] = 0;
	if (fd < 0)
		return;
	if (read(fd, text, sizeof text - 1) > 0)
		sscanf(text, "%15s %d", word, number);
	close(fd);
}

static int is_netlink(int fd)
{
	int domain = 0;
	socklen_t size = sizeof domain;

	return !getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) && domain == AF_NETLINK;
}

static int capable(int yes)
{
	struct __user_cap_header_struct head = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2];

	if (syscall(SYS_capget, &head, data))
		return -1;
	if (yes)
		data[0].effective |= 1u << CAP_NET_ADMIN;
	else
		data[0].effective &= ~(1u << CAP_NET_ADMIN);
	return syscall(SYS_capset, &head, data);
}

static int is_answered(const char *word)
{
	return !strcmp(word, "answer") || !strcmp(word, "address");
}

static void spoil(char *data, size_t size, int addresses_only)
{
	struct nlmsghdr *head = (struct nlmsghdr *)data;

	for (int left = size; NLMSG_OK(head, left); head = NLMSG_NEXT(head, left))
		/* NEW, DEL, GET, SET: in this order from 16 on */
		if (addresses_only ? head->nlmsg_type == RTM_NEWADDR
				   : head->nlmsg_type >= RTM_NEWLINK && head->nlmsg_type % 4 != 2)
			head->nlmsg_type = UNKNOWN;
}

ssize_t sendto(int fd, const void *data, size_t size, int flags, const struct sockaddr *to,
	       socklen_t length)
{
	static ssize_t (*real)(int, const void *, size_t, int, const struct sockaddr *, socklen_t);
	char word[16];
	int number, answer, saved;
	ssize_t sent;
	char *copy;

	if (!real)
		real = dlsym(RTLD_NEXT, "sendto");
	if (!is_netlink(fd))
		return real(fd, data, size, flags, to, length);
	order(word, &number);
	if (!strcmp(word, "send")) {
		errno = number;
		return -1;
	}
	answer = is_answered(word);
	if (strcmp(word, "caps") && !answer)
		return real(fd, data, size, flags, to, length);
	copy = malloc(size);
	memcpy(copy, data, size);
	if (answer)
		spoil(copy, size, !strcmp(word, "address"));
	else
		capable(0);
	sent = real(fd, copy, size, flags, to, length);
	saved = errno;
	if (!answer)
		capable(1);
	errno = saved;
	free(copy);
	return sent;
}

ssize_t send(int fd, const void *data, size_t size, int flags)
{
	return sendto(fd, data, size, flags, NULL, 0);
}

ssize_t recvfrom(int fd, void *data, size_t size, int flags, struct sockaddr *from,
		 socklen_t *length)
{
	static ssize_t (*real)(int, void *, size_t, int, struct sockaddr *, socklen_t *);
	struct nlmsghdr *head = data;
	char word[16];
	int number;
	ssize_t got;

	if (!real)
		real = dlsym(RTLD_NEXT, "recvfrom");
	got = real(fd, data, size, flags, from, length);
	if (got <= 0 || !is_netlink(fd))
		return got;
	order(word, &number);
	if (!is_answered(word))
		return got;
	for (int left = got; NLMSG_OK(head, left); head = NLMSG_NEXT(head, left)) {
		struct nlmsgerr *error = NLMSG_DATA(head);

		if (head->nlmsg_type == NLMSG_ERROR && error->error == -EOPNOTSUPP)
			error->error = -number;
	}
	return got;
}

ssize_t recv(int fd, void *data, size_t size, int flags)
{
	return recvfrom(fd, data, size, flags, NULL, NULL);
}
