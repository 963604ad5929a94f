/* Traffic for the benchmark, made cheap so that the tunnel is what is measured.
 *
 *     traffic tcp-sink PORT                          prints a line of totals per second
 *     traffic tcp-source ADDRESS PORT STREAMS CONGESTION SECONDS
 *     traffic udp-sink PORT
 *     traffic udp-source ADDRESS PORT SIZE SECONDS
 *     traffic udp-echo PORT / traffic ping ADDRESS PORT COUNT    median round trip in microseconds
 *
 * A sink prints "READY", then "MICROSECONDS TOTAL" every 100 ms and ends after 1 s without traffic
 * once there was some (at the latest after 60 s).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_STREAMS 64
#define CHUNK (256 << 10)
#define BATCH 32

static char chunk[CHUNK];

static int64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}

static struct sockaddr_in target(const char *address, const char *port)
{
	struct sockaddr_in to = { .sin_family = AF_INET };

	to.sin_port = htons(atoi(port));
	to.sin_addr.s_addr = address ? inet_addr(address) : INADDR_ANY;
	return to;
}

static int bound(int type, const char *port)
{
	struct sockaddr_in at = target(NULL, port);
	int one = 1, fd = socket(AF_INET, type, 0);

	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (bind(fd, (struct sockaddr *)&at, sizeof(at)) < 0) {
		perror("bind");
		exit(1);
	}
	return fd;
}

static int sink(int type, const char *port)
{
	struct pollfd fds[MAX_STREAMS + 1];
	int count = 1, listener = bound(type, port);
	int64_t total = 0, begun = now(), last = begun, shown = begun;

	if (type == SOCK_STREAM)
		listen(listener, MAX_STREAMS);
	fds[0] = (struct pollfd){ .fd = listener, .events = POLLIN };
	printf("READY\n");
	fflush(stdout);
	for (;;) {
		int64_t t;

		poll(fds, count, 100);
		t = now();
		if (type == SOCK_STREAM && fds[0].revents & POLLIN && count <= MAX_STREAMS) {
			fds[count].fd = accept(listener, NULL, NULL);
			fds[count].revents = 0;
			fds[count++].events = POLLIN;
		} else if (fds[0].revents & POLLIN) {
			struct mmsghdr messages[BATCH] = { 0 };
			struct iovec piece = { chunk, 2048 };
			int n;

			for (int i = 0; i < BATCH; i++) {
				messages[i].msg_hdr.msg_iov = &piece;
				messages[i].msg_hdr.msg_iovlen = 1;
			}
			n = recvmmsg(listener, messages, BATCH, MSG_DONTWAIT, NULL);
			if (n > 0) {
				total += n;
				last = t;
			}
		}
		for (int i = 1; i < count; i++) {
			ssize_t n;

			if (!(fds[i].revents & (POLLIN | POLLHUP)))
				continue;
			/* As an application does. */
			n = recv(fds[i].fd, chunk, CHUNK, MSG_DONTWAIT);
			if (n > 0) {
				total += n;
				last = t;
			} else if (n == 0) {
				fds[i].events = 0;
				close(fds[i].fd);
				fds[i].fd = -1;
			}
		}
		if (t - shown >= 100000) {
			printf("%lld %lld\n", (long long)t, (long long)total);
			fflush(stdout);
			shown = t;
		}
		if ((total && t - last > 1000000) || t - begun > 60000000)
			return 0;
	}
}

static int tcp_source(const char *address, const char *port, int streams, const char *congestion,
		      double seconds)
{
	struct sockaddr_in to = target(address, port);
	struct pollfd fds[MAX_STREAMS];
	int64_t end;

	for (int i = 0; i < streams; i++) {
		fds[i].fd = socket(AF_INET, SOCK_STREAM, 0);
		fds[i].events = POLLOUT;
		if (setsockopt(fds[i].fd, IPPROTO_TCP, TCP_CONGESTION, congestion,
			       strlen(congestion)) < 0) {
			perror(congestion);
			return 1;
		}
		if (connect(fds[i].fd, (struct sockaddr *)&to, sizeof(to)) < 0) {
			perror("connect");
			return 1;
		}
	}
	end = now() + seconds * 1e6;
	while (now() < end) {
		poll(fds, streams, 100);
		for (int i = 0; i < streams; i++)
			if (fds[i].revents)
				send(fds[i].fd, chunk, CHUNK, MSG_DONTWAIT | MSG_NOSIGNAL);
	}
	for (int i = 0; i < streams; i++) {
		struct linger now = { 1, 0 };

		setsockopt(fds[i].fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
	}
	return 0;
}

static int udp_source(const char *address, const char *port, int size, double seconds)
{
	struct sockaddr_in to = target(address, port);
	struct mmsghdr messages[BATCH] = { 0 };
	struct iovec piece = { chunk, size };
	int64_t end = now() + seconds * 1e6;
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	connect(fd, (struct sockaddr *)&to, sizeof(to));
	for (int i = 0; i < BATCH; i++) {
		messages[i].msg_hdr.msg_iov = &piece;
		messages[i].msg_hdr.msg_iovlen = 1;
	}
	while (now() < end)
		sendmmsg(fd, messages, BATCH, 0);
	return 0;
}

static int echo(const char *port)
{
	int fd = bound(SOCK_DGRAM, port);
	struct sockaddr_in from;
	socklen_t length = sizeof(from);
	ssize_t n;

	printf("READY\n");
	fflush(stdout);
	while ((n = recvfrom(fd, chunk, CHUNK, 0, (struct sockaddr *)&from, &length)) >= 0)
		sendto(fd, chunk, n, 0, (struct sockaddr *)&from, length);
	return 0;
}

static int order(const void *a, const void *b)
{
	int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;

	return (x > y) - (x < y);
}

static int ping(const char *address, const char *port, int count)
{
	struct sockaddr_in to = target(address, port);
	struct timeval second = { 1, 0 };
	int64_t *times = calloc(count, sizeof(*times));
	int fd = socket(AF_INET, SOCK_DGRAM, 0), got = 0;

	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &second, sizeof(second));
	connect(fd, (struct sockaddr *)&to, sizeof(to));
	for (int i = 0; i < count; i++) {
		int64_t begun = now();

		send(fd, chunk, 56, 0);
		if (recv(fd, chunk, CHUNK, 0) > 0)
			times[got++] = now() - begun;
		usleep(5000);
	}
	qsort(times, got, sizeof(*times), order);
	printf("%lld\n", got ? (long long)times[got / 2] : -1LL);
	return 0;
}

int main(int argc, char **argv)
{
	const char *mode = argc > 2 ? argv[1] : "";

	if (!strcmp(mode, "tcp-sink"))
		return sink(SOCK_STREAM, argv[2]);
	if (!strcmp(mode, "udp-sink"))
		return sink(SOCK_DGRAM, argv[2]);
	if (!strcmp(mode, "udp-echo"))
		return echo(argv[2]);
	if (!strcmp(mode, "tcp-source") && argc == 7)
		return tcp_source(argv[2], argv[3], atoi(argv[4]), argv[5], atof(argv[6]));
	if (!strcmp(mode, "udp-source") && argc == 6)
		return udp_source(argv[2], argv[3], atoi(argv[4]), atof(argv[5]));
	if (!strcmp(mode, "ping") && argc == 5)
		return ping(argv[2], argv[3], atoi(argv[4]));
	fprintf(stderr, "see the beginning of the source\n");
	return 2;
}
