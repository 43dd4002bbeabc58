#!/bin/sh
# Asks every KVM of docs/kernels.md again, and puts what comes of it into the page and its data.
# "soft" asks the software KVM only, which takes seconds, "intel" kvm_intel only, four minutes for a
# column; a kernel in the lab takes two otherwise.
# The kernels: guestfault lab fetch --bochs 6.12 6.18 7.3, and one with private memory, which has to be
# built: scripts/sw-protected-kernel.sh, then guestfault lab add.
set -e
cd "$(dirname "$0")/.."
guestfault=${GUESTFAULT:-.venv/bin/guestfault}
here=$("$guestfault" lab list)
soft= intel= lab= kvm=
stays() {
	echo "${0##*/}: $1" >&2
}
case ${1:-all} in
soft | all)
	for dialect in linux-6.8 linux-7.3 seed; do
		soft="$soft --on soft:$dialect --on soft:$dialect,npt=0"
	done
	;;
esac
case ${1:-all} in
intel | all)
	if echo "$here" | grep -q '^Bochs [0-9]'; then
		for kernel in 6.12 6.18 7.3; do
			intel="$intel --on lab:$kernel,ept=1 --on lab:$kernel,ept=0"
		done
	else
		stays "Bochs is not here; the columns of kvm_intel stay as they are"
	fi
	;;
esac
if [ "${1:-all}" = all ]; then
	for kernel in 6.12 6.18 7.3; do
		lab="$lab --on lab:$kernel --on lab:$kernel,npt=0"
	done
	built=$(echo "$here" | sed -n 's/^\([^ ]*-sw-protected\) .*/\1/p' | tail -n 1)
	if [ -n "$built" ]; then
		lab="$lab --on lab:$built"
	else
		stays "no kernel with private memory is here; its column stays as it is"
	fi
	kvm="--on kvm"
fi
if [ -z "$lab$intel$soft" ]; then
	stays "nothing to ask; say soft, intel, or neither for all"
	exit 1
fi
exec "$guestfault" conform $lab $intel $kvm $soft \
	--into docs/data/kernels.json --page docs/kernels.md
