#!/usr/bin/env bash
# Runs tests in a virtual machine whose kernel has netem, for machines whose own kernel lacks it. As root, on Debian:
#
#   bash tests/cluster/netem_vm.sh                                   the tests of preflight that need netem
#   bash tests/cluster/netem_vm.sh tests/cluster/test_two_hosts.py   others
#
# The machine has Debian's kernel and this machine's files: they are read over 9p, and what the tests write stays in the
# machine's memory. Nothing is installed or changed here but four packages; the kernel is unpacked into a temporary
# folder. Without hardware virtualisation (set ACCEL=kvm where it works) it is about 15 times slower: allow half an hour.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
venv="${ADALORA_VENV:-$root/.venv}"
tests=("$@")
((${#tests[@]})) || tests=(tests/cluster/test_preflight_network.py -k netem)

export DEBIAN_FRONTEND=noninteractive
for program in qemu-system-x86_64 busybox depmod; do
    command -v "$program" >/dev/null && continue
    apt-get update --quiet
    apt-get install --yes --quiet --no-install-recommends qemu-system-x86 seabios busybox-static kmod
    break
done

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
package="$(apt-cache depends linux-image-amd64 | awk '/Depends: linux-image-/ {print $2 "-unsigned"; exit}')"
apt-get download "$package" 2>/dev/null
dpkg-deb -x "$package"_*.deb kernel
release="$(basename kernel/lib/modules/*)"
depmod -b kernel "$release"

# The first file system: busybox, and the modules in the order in which they depend on each other.
mkdir -p first/{bin,proc,sys,dev,system,modules} out
cp "$(command -v busybox)" first/bin/busybox
for module in virtio_pci 9pnet_virtio 9p overlay veth bridge sch_netem sch_tbf; do
    modprobe -d "$work/kernel" -S "$release" --show-depends "$module" | awk '/^insmod/ {print $2}'
done | awk '!seen[$0]++' >order
while read -r file; do
    cp "$file" first/modules/
    basename "$file" >>first/modules/order
done <order
cat >first/init <<'EOF'
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc
for module in $($b cat /modules/order); do $b insmod "/modules/$module"; done
$b mkdir -p /lower /upper
$b mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro files /lower
$b mount -t tmpfs tmpfs /upper
$b mkdir -p /upper/new /upper/scratch
$b mount -t overlay -o lowerdir=/lower,upperdir=/upper/new,workdir=/upper/scratch overlay /system
$b mount -t proc proc /system/proc
$b mount -t sysfs sysfs /system/sys
$b mount -t devtmpfs devtmpfs /system/dev
$b mkdir -p /system/dev/shm /system/mnt
for folder in dev/shm run; do $b mount -t tmpfs tmpfs /system/$folder; done
$b mount -t 9p -o trans=virtio,version=9p2000.L out /system/mnt
$b chroot /system /bin/bash /mnt/job
echo o >/proc/sysrq-trigger
$b sleep 60
EOF
chmod +x first/init
(cd first && find . | busybox cpio -o -H newc 2>/dev/null | gzip) >first.gz

cat >out/job <<EOF
cd $(printf %q "$root") || exit
export PATH=$(printf %q "$venv/bin"):/usr/sbin:/usr/bin:/sbin:/bin HOME=$(printf %q "$HOME")
export ADALORA_TEST_SLOWNESS=20 OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
ip link set lo up
python -m pytest -o timeout=3600 -p no:cacheprovider -v $(printf '%q ' "${tests[@]}")
echo \$? >/mnt/status
EOF

accel="${ACCEL:-tcg,thread=multi}"
qemu-system-x86_64 -accel "$accel" -cpu max -m 6G -smp "$(nproc)" -nographic -no-reboot -nic none \
    -kernel kernel/boot/vmlinuz-"$release" -initrd first.gz -append "console=ttyS0 panic=-1 quiet" \
    -fsdev local,id=files,path=/,security_model=none,readonly=on,multidevs=remap \
    -device virtio-9p-pci,fsdev=files,mount_tag=files \
    -fsdev local,id=out,path="$work/out",security_model=none -device virtio-9p-pci,fsdev=out,mount_tag=out </dev/null
status="$(cat out/status 2>/dev/null || echo 1)"
exit "$status"
