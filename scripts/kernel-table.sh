#!/bin/sh
# Asks every KVM of docs/kernels.md again, and puts what comes of it into the page and its data.
# "soft" asks the software KVM only, which takes seconds; a kernel in the lab takes two minutes.
# The kernels: guestfault lab fetch 6.12 6.18 7.3
set -e
cd "$(dirname "$0")/.."
soft=
for dialect in linux-6.8 linux-7.3 seed; do
	soft="$soft --on soft:$dialect --on soft:$dialect,npt=0"
done
kvms=$soft
if [ "$1" != soft ]; then
	for kernel in 6.12 6.18 7.3; do
		lab="$lab --on lab:$kernel --on lab:$kernel,npt=0"
	done
	kvms="$lab --on kvm $soft"
fi
exec "${GUESTFAULT:-.venv/bin/guestfault}" conform $kvms \
	--into docs/data/kernels.json --page docs/kernels.md
