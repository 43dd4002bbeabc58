"""The kernel's binary interface: numbers and ctypes structures under the kernel's own names."""
