/*
 * The loop of guestfault/paging/hot.py and the reader of hot_reader.py, in C, on the same words:
 * what numba's code is measured against.  The places of the words come as -D options from
 * guestfault/paging/hot_words.py, so the two cannot differ in what they are told; a library says
 * which places it was built for.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/kvm.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef int64_t word;

const int hot_built_for = BUILT_FOR;

static word now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void record(word *w, word *histogram, word ns)
{
	int shift = 0;

	while (ns >> shift >= 2 << SUB_BITS)
		shift++;
	histogram[(shift << SUB_BITS) + (ns >> shift)]++;
	w[LATENCY_TOTAL] += ns;
	if (ns > w[LATENCY_MAX])
		w[LATENCY_MAX] = ns;
}

static word offset_of(word *w, word gpa)
{
	for (word *row = w + SLOT_TABLE; row < w + SLOT_TABLE + SLOT_WORDS * w[SLOTS]; row += SLOT_WORDS)
		if (row[0] <= gpa && gpa < row[1])
			return gpa + row[2];
	return -1;
}

static word translate(word *w, word gva)
{
	struct kvm_sregs *s = (void *)(w[KVM_RUN_AT] + SREGS_OFFSET);
	word table = s->cr3 & 0xffffffffff000;
	int shift = s->cr4 & 1 << 12 ? 48 : 39;

	if (!(s->cr0 & 1u << 31 && s->cr4 & 1 << 5 && s->efer & 1 << 10))
		return -1;
	for (;; shift -= 9) {
		word offset = offset_of(w, table + (gva >> shift & 511) * 8), entry, low = (1LL << shift) - 1;

		if (offset < 0 || !__atomic_load_n((char *)w[FILLED_AT] + (offset >> 12), __ATOMIC_ACQUIRE))
			return -1;
		entry = *(word *)(w[HOST_AT] + offset);
		if (!(entry & 1))
			return -1;
		if (shift == 12 || (shift <= 30 && entry & 1 << 7))
			return (entry & 0xffffffffff000 & ~low) | (gva & low);
		if (entry & 1 << 7)
			return -1;
		table = entry & 0xffffffffff000;
	}
}

static uint32_t u32(word *w, word place)
{
	return *(uint32_t *)(w[RING_AT] + (place & (w[RING_SIZE] - 1)));
}

static word failed_gpa(word *w)
{
	struct kvm_run *run = (void *)w[KVM_RUN_AT];
	word ring = w[RING_AT], mask = w[RING_SIZE] - 1, head, left, address = 0, gva = -1;
	int said = 0;

	if (run->exit_reason == w[FAULT_EXIT]) {
		uint64_t *fault = (void *)&run->hw;

		return fault[2] && (fault[1] & 4095) + fault[2] <= 4096 ? (word)fault[1] : -1;
	}
	head = *(volatile word *)w[RING_HEAD_AT];
	for (left = -head < mask + 1 ? -head : mask + 1; left >= 8;) {
		word header = *(word *)(ring + (head & mask)), size = header >> 48 & 0xffff, event;

		if (size <= 12 || size > left || (header & 0xffffffff) != 9)
			return -1;
		event = *(uint16_t *)(ring + ((head + 12) & mask));
		if (!said) {
			if (event != w[EXIT_ID] || (int)u32(w, head + w[EXIT_ERRNO]) != -EFAULT)
				return -1;
			said = 1;
		} else if (event == w[FAULT_EVENTS] || event == w[FAULT_EVENTS + 3]) {
			if (said == 1) {
				word *row = w + FAULT_EVENTS + (event == w[FAULT_EVENTS] ? 0 : 3);

				address = u32(w, head + row[1]) | (word)u32(w, head + row[1] + 4) << 32;
				gva = row[2];
				said = 2;
			}
		} else if (event == w[BEGINS] || event == w[BEGINS + 1] || event == w[BEGINS + 2]) {
			if (said != 2)
				return -1;
			return gva == 1 ? translate(w, address) : gva == 0 ? address : -1;
		} else {
			return -1;
		}
		head += size;
		left -= size;
	}
	return -1;
}

static int let_in(word *w, word page)
{
	word arg[5] = { w[GUEST_AT] + page * 4096, 4096 };

	if (w[SOURCE] == SOURCE_NONE)
		return ioctl(w[UFFD], UFFDIO_CONTINUE_, arg);
	arg[1] = w[SOURCE_AT] + page * 4096;
	arg[2] = 4096;
	return ioctl(w[UFFD], UFFDIO_COPY, arg);
}

static int bring_in(word *w, word page)
{
	char *filled = (char *)w[FILLED_AT], *claims = (char *)w[CLAIMS_AT], nobody = 0;

	/* The benchmark's pages are all absent; what is not is left to Python. */
	if (__atomic_load_n(filled + page, __ATOMIC_ACQUIRE) ||
	    !__atomic_compare_exchange_n(claims + page, &nobody, 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
		return 0;
	if (let_in(w, page)) {
		__atomic_store_n(claims + page, 0, __ATOMIC_RELEASE);
		return 0;
	}
	__atomic_store_n(filled + page, 1, __ATOMIC_RELEASE);
	w[PAGES_IN]++;
	return 1;
}

word hot_run(word *w, word *histogram)
{
	word began = now(), faults = 0;

	for (;;) {
		int result = ioctl(w[VCPU_FD], KVM_RUN, 0), failed = result < 0 ? errno : 0;
		word exited = now(), gpa, offset, resolved;

		if (result >= 0)
			return result;
		if (failed != EFAULT)
			return -failed;
		gpa = failed_gpa(w);
		offset = offset_of(w, gpa);
		if (offset < 0 || gpa >> 12 == w[LAST_PAGE] || !bring_in(w, offset >> 12))
			return -failed;
		w[LAST_PAGE] = gpa >> 12;
		w[BARE]++;
		resolved = now();
		record(w, histogram, resolved - exited);
		if (++faults >= w[BUDGET] || resolved - began > w[BUDGET_NS])
			return NOTHING;
	}
}

word hot_serve(word *w, word *histogram)
{
	for (;;) {
		struct pollfd fds[2] = { { w[UFFD], POLLIN }, { w[STOP_FD], POLLIN } };
		struct uffd_msg *msg = (void *)w[STAGING_AT];
		word began, got;

		if (poll(fds, 2, -1) < 0)
			continue;
		if (fds[1].revents)
			return 0;
		began = now();
		got = read(w[UFFD], msg, w[MESSAGES] * sizeof(*msg));
		if (got < 0 && errno != EAGAIN)
			return -errno;
		for (; got >= (word)sizeof(*msg); got -= sizeof(*msg), msg++) {
			word address = msg->arg.pagefault.address & -4096LL;

			if (msg->event != UFFD_EVENT_PAGEFAULT)
				continue;
			while (let_in(w, (address - w[GUEST_AT]) >> 12)) {
				struct uffdio_range range = { address, 4096 };

				if (errno == EEXIST) {
					ioctl(w[UFFD], UFFDIO_WAKE, &range);
					break;
				}
				if (errno != EAGAIN)
					return -errno;
			}
			w[SERVED]++;
			record(w, histogram, now() - began);
		}
	}
}

/* What a fault is made of; nanoseconds, or -1 if one of the calls ended otherwise. */

word hot_round_trips(word vcpu, word times, word expected)
{
	word began = now();

	while (times--)
		if ((ioctl(vcpu, KVM_RUN, 0) < 0 ? errno : 0) != expected)
			return -1;
	return now() - began;
}

word hot_walk(word *w, word first, word pages)
{
	word in_kvm_run = 0;

	for (word page = first; page < first + pages; page++) {
		word entered = now();

		if (!ioctl(w[VCPU_FD], KVM_RUN, 0) || errno != EFAULT)
			return -1;
		in_kvm_run += now() - entered;
		if (let_in(w, page))
			return -1;
	}
	return in_kvm_run;
}

word hot_let_in(word *w, word first, word pages)
{
	word began = now();

	for (word page = first; page < first + pages; page++)
		if (let_in(w, page))
			return -1;
	return now() - began;
}
