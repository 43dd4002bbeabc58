"""What a result of ``KVM_RUN`` means, which access it was about, and why that access failed."""
