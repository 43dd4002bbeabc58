#!/bin/sh
# Builds a small Linux kernel for `guestfault lab`, whose KVM has VMs of the type
# KVM_X86_SW_PROTECTED_VM: private and shared memory without hardware for it.  No distribution's
# kernel has them, because CONFIG_KVM_SW_PROTECTED_VM depends on CONFIG_EXPERT.
#
#     sw-protected-kernel.sh [--builtin] SOURCE OUTPUT
#
# SOURCE is a kernel's source tree, or a tar archive of one: Debian's package linux-source-7.3 has
# such an archive in usr/src, kernel.org has others.  The tree is only read.  OUTPUT gets
#
#     boot/vmlinuz-RELEASE          the kernel, for `guestfault lab run --kernel`
#     lib/modules/RELEASE           its modules: KVM's, and nothing else
#     build, source                 what was compiled; may go when you are done
#
# --builtin has KVM in the kernel itself, and then there are no modules.  Run again with the same
# OUTPUT, it compiles what the change touches, and puts the other kernel beside the first.
#
# It takes gcc, make, flex, bison, bc, and the headers of libelf and OpenSSL: on Debian,
#     apt-get install build-essential flex bison bc libelf-dev libssl-dev
# 2 GB of disk, and ten minutes on two cores.  JOBS=N says how many compilers run at once.
set -eu

usage() {
	echo "usage: ${0##*/} [--builtin] SOURCE OUTPUT" >&2
	exit 2
}

fail() {
	echo "${0##*/}: $*" >&2
	exit 1
}

kvm=m
if [ "${1-}" = --builtin ]; then
	kvm=y
	shift
fi
[ $# -eq 2 ] || usage
source=$1
jobs=${JOBS:-$(nproc)}

for program in gcc make flex bison bc tar; do
	command -v "$program" >/dev/null || fail "no $program on this system (see the top of this file)"
done
for header in libelf.h openssl/opensslv.h; do
	echo "#include <$header>" | gcc -E -o /dev/null - 2>/dev/null ||
		fail "no $header on this system (see the top of this file)"
done

mkdir -p "$2"
output=$(cd "$2" && pwd)
if [ -f "$source" ]; then
	if [ ! -d "$output/source" ]; then
		echo "unpacking $source"
		rm -rf "$output/source.part"
		mkdir "$output/source.part"
		tar -xf "$source" -C "$output/source.part" --strip-components=1 || {
			rm -rf "$output/source.part"
			fail "$source cannot be unpacked"
		}
		mv "$output/source.part" "$output/source"
	fi
	source=$output/source
fi
[ -f "$source/arch/x86/kvm/Kconfig" ] || fail "$source is no kernel's source"
source=$(cd "$source" && pwd)
build=$output/build
mkdir -p "$build"

# All that the lab's machine has and that guestfault asks of a kernel; the rest of a kernel is off.
cat >"$build/wanted.config" <<EOF
CONFIG_64BIT=y
CONFIG_SMP=y
CONFIG_EXPERT=y
CONFIG_MULTIUSER=y
CONFIG_PRINTK=y
CONFIG_BUG=y
CONFIG_KALLSYMS=y
CONFIG_ACPI=y
CONFIG_PCI=y
CONFIG_X86_PM_TIMER=y
CONFIG_HIGH_RES_TIMERS=y
CONFIG_NO_HZ_IDLE=y
CONFIG_HZ_250=y
CONFIG_UNWINDER_FRAME_POINTER=y
CONFIG_MODULES=y
CONFIG_LOCALVERSION="-sw-protected$([ "$kvm" = m ] || echo -builtin)"

# The first process: an initramfs, a console, a second serial port, file systems in memory.
CONFIG_BLK_DEV_INITRD=y
CONFIG_BINFMT_ELF=y
CONFIG_BINFMT_SCRIPT=y
CONFIG_TTY=y
CONFIG_SERIAL_8250=y
CONFIG_SERIAL_8250_CONSOLE=y
CONFIG_SERIAL_8250_NR_UARTS=4
CONFIG_SERIAL_8250_RUNTIME_UARTS=4
CONFIG_DEVTMPFS=y
CONFIG_PROC_FS=y
CONFIG_PROC_SYSCTL=y
CONFIG_SYSCTL=y
CONFIG_PROC_PAGE_MONITOR=y
CONFIG_SYSFS=y
CONFIG_SHMEM=y
CONFIG_TMPFS=y
CONFIG_HUGETLBFS=y

# What Python and the tests of this package call.
CONFIG_FUTEX=y
CONFIG_EPOLL=y
CONFIG_EVENTFD=y
CONFIG_SIGNALFD=y
CONFIG_TIMERFD=y
CONFIG_POSIX_TIMERS=y
CONFIG_MEMBARRIER=y
CONFIG_RSEQ=y
CONFIG_FILE_LOCKING=y
CONFIG_NET=y
CONFIG_UNIX=y
CONFIG_INET=y

# Memory, and what can be the matter with it.
CONFIG_ADVISE_SYSCALLS=y
CONFIG_MEMFD_CREATE=y
CONFIG_USERFAULTFD=y
CONFIG_PTE_MARKER_UFFD_WP=y
CONFIG_X86_MCE=y
CONFIG_MEMORY_FAILURE=y
CONFIG_TRANSPARENT_HUGEPAGE=y
CONFIG_TRANSPARENT_HUGEPAGE_MADVISE=y

# Tracepoints, by perf and by tracefs.
CONFIG_PERF_EVENTS=y
CONFIG_FTRACE=y
CONFIG_ENABLE_DEFAULT_TRACERS=y
CONFIG_DEBUG_FS=y
CONFIG_DEBUG_FS_ALLOW_ALL=y

# KVM.
CONFIG_VIRTUALIZATION=y
CONFIG_CPU_SUP_AMD=y
CONFIG_KVM=$kvm
CONFIG_KVM_AMD=$kvm
CONFIG_KVM_SW_PROTECTED_VM=y
CONFIG_KVM_IOAPIC=y
CONFIG_KVM_SMM=y
CONFIG_KVM_HYPERV=y
CONFIG_KVM_XEN=y
EOF

make_kernel() {
	make -C "$source" O="$build" ARCH=x86_64 -j "$jobs" "$@"
}

echo "configuring"
make_kernel -s KCONFIG_ALLCONFIG="$build/wanted.config" allnoconfig
for wanted in $(grep '^CONFIG' "$build/wanted.config" | grep -vxF -f "$build/.config"); do
	name=${wanted%%=*}
	# Options come and go with the versions: one that this version has not is no loss, but this one.
	if [ "$name" = CONFIG_KVM_SW_PROTECTED_VM ] ||
		grep -rqx --include='Kconfig*' "\(menu\)\?config ${name#CONFIG_}" "$source"; then
		fail "this kernel's configuration does not take $wanted"
	fi
done

echo "compiling; its messages are in $build/log"
targets=bzImage
[ "$kvm" = y ] || targets="$targets modules"
# shellcheck disable=SC2086 # words
make_kernel -s $targets >"$build/log" 2>&1 || {
	tail -n 20 "$build/log" >&2
	fail "make failed"
}

release=$(make_kernel -s kernelrelease)
mkdir -p "$output/boot"
cp "$build/arch/x86/boot/bzImage" "$output/boot/vmlinuz-$release"
if [ "$kvm" = m ]; then
	# The lab does not use what depmod would write.
	make_kernel -s DEPMOD=true INSTALL_MOD_PATH="$output" modules_install >>"$build/log" 2>&1 ||
		fail "make modules_install failed"
fi
echo "$output/boot/vmlinuz-$release"
