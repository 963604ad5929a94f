/* Has the wall clock be off: LD_PRELOADed into flanneld by the soak. The other clocks are real.
 *
 * The file $FLANNEL_CLOCK holds by how many seconds it is ahead, an int64_t that may change any time.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *file;

__attribute__((constructor)) static void find(void)
{
	const char *path = getenv("FLANNEL_CLOCK");
	int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
	void *mapped;

	if (fd < 0)
		return;
	mapped = mmap(NULL, sizeof *file, PROT_READ, MAP_SHARED, fd, 0);
	if (mapped != MAP_FAILED)
		file = mapped;
	close(fd);
}

static int64_t ahead(void)
{
	return file ? *file : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
	static int (*real)(clockid_t, struct timespec *);
	int result;

	if (!real)
		real = dlsym(RTLD_NEXT, "clock_gettime");
	result = real(clock, now);
	if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
		now->tv_sec += ahead();
	return result;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
	static int (*real)(struct timeval *, void *);
	int result;

	if (!real)
		real = dlsym(RTLD_NEXT, "gettimeofday");
	result = real(now, zone);
	if (!result && now)
		now->tv_sec += ahead();
	return result;
}

time_t time(time_t *now)
{
	struct timespec exact;

	clock_gettime(CLOCK_REALTIME, &exact);
	if (now)
		*now = exact.tv_sec;
	return exact.tv_sec;
}
