"""What the x86 architecture says: control bits, segments, page tables. No KVM and no host in it."""
