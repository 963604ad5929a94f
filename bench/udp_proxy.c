/* The stand-in for the original's proxy: one packet per system call, nothing else.
 *
 *     udp_proxy TUN SOCKET MTU SUBNET MASK PEER PORT [SUBNET MASK PEER PORT ...]
 *
 * TUN and SOCKET are inherited non-blocking descriptors, the TUN device is without virtio header,
 * the socket has the kernel's default buffers. Addresses are dotted. Forwards until it is killed.
 *
 * As in the original there is one loop and one buffer of MTU bytes; while either side delivers,
 * both are read in turn without polling; routes are a list that is searched from its beginning,
 * and what was found moves to the front; the checksum is corrected, not computed. What it lacks
 * costs the original next to nothing per packet: the control socket, ICMP errors, messages.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAX_ROUTES 64

struct route {
	uint32_t net, mask;
	struct sockaddr_in peer;
};

static struct route routes[MAX_ROUTES];
static int count;
static unsigned char *buffer;
static size_t mtu;

static int decrement_ttl(unsigned char *packet)
{
	uint32_t sum;

	if (packet[8] <= 1)
		return 0;
	packet[8]--;
	sum = (packet[10] << 8 | packet[11]) + 0x0100;
	sum += sum >= 0xFFFF;
	packet[10] = sum >> 8;
	packet[11] = sum;
	return 1;
}

static const struct sockaddr_in *lookup(uint32_t address)
{
	for (int i = 0; i < count; i++)
		if ((address & routes[i].mask) == routes[i].net) {
			if (i) {
				struct route found = routes[i];

				routes[i] = routes[0];
				routes[0] = found;
			}
			return &routes[0].peer;
		}
	return NULL;
}

static int from_tun(int tun, int udp)
{
	uint32_t target;
	const struct sockaddr_in *peer;
	ssize_t length = read(tun, buffer, mtu);

	if (length < 0)
		return 0;
	if (length < 20)
		return 1;
	memcpy(&target, buffer + 16, 4);
	peer = lookup(target);
	if (peer && decrement_ttl(buffer))
		sendto(udp, buffer, length, 0, (const struct sockaddr *)peer, sizeof(*peer));
	return 1;
}

static int from_udp(int tun, int udp)
{
	ssize_t length = recv(udp, buffer, mtu, 0);

	if (length < 0)
		return 0;
	if (length >= 20 && decrement_ttl(buffer))
		while (write(tun, buffer, length) < 0 && errno == EAGAIN)
			;
	return 1;
}

int main(int argc, char **argv)
{
	int tun, udp;
	struct pollfd fds[2];

	if (argc < 4)
		return 2;
	tun = atoi(argv[1]);
	udp = atoi(argv[2]);
	mtu = atoi(argv[3]);
	buffer = malloc(mtu);
	if (mtu < 20 || !buffer)
		return 2;
	for (int i = 4; i + 3 < argc && count < MAX_ROUTES; i += 4, count++) {
		struct route *r = &routes[count];

		r->net = inet_addr(argv[i]);
		r->mask = inet_addr(argv[i + 1]);
		r->peer.sin_family = AF_INET;
		r->peer.sin_addr.s_addr = inet_addr(argv[i + 2]);
		r->peer.sin_port = htons(atoi(argv[i + 3]));
	}
	fds[0] = (struct pollfd){ .fd = tun, .events = POLLIN };
	fds[1] = (struct pollfd){ .fd = udp, .events = POLLIN };
	for (;;) {
		int busy;

		if (poll(fds, 2, -1) < 0 && errno != EINTR)
			return 1;
		if (fds[0].revents & POLLERR)
			return 3;
		do {
			busy = from_tun(tun, udp);
			busy |= from_udp(tun, udp);
		} while (busy);
	}
}
