#!/bin/sh
# Asks every KVM of docs/kernels.md again, and puts what comes of it into the page and its data.
# "soft" asks the software KVM only, which takes seconds; a kernel in the lab takes two minutes.
# The kernels: guestfault lab fetch 6.12 6.18 7.3, and one with private memory, which has to be built:
# scripts/sw-protected-kernel.sh, then guestfault lab add.
set -e
cd "$(dirname "$0")/.."
guestfault=${GUESTFAULT:-.venv/bin/guestfault}
soft=
for dialect in linux-6.8 linux-7.3 seed; do
	soft="$soft --on soft:$dialect --on soft:$dialect,npt=0"
done
kvms=$soft
if [ "$1" != soft ]; then
	for kernel in 6.12 6.18 7.3; do
		lab="$lab --on lab:$kernel --on lab:$kernel,npt=0"
	done
	built=$("$guestfault" lab list | sed -n 's/^\([^ ]*-sw-protected\) .*/\1/p' | tail -n 1)
	if [ -n "$built" ]; then
		lab="$lab --on lab:$built"
	else
		echo "${0##*/}: no kernel with private memory is here; its column stays as it is" >&2
	fi
	kvms="$lab --on kvm $soft"
fi
exec "$guestfault" conform $kvms \
	--into docs/data/kernels.json --page docs/kernels.md
