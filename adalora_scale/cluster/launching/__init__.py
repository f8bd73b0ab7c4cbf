"""What the launch scripts check before any rank starts: hosts, ports, batch sizes, sbatch files."""
