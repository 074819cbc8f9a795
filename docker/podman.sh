#!/bin/sh
# FedVision's image on Debian 12 where there is no container engine and no registry of images, as root:
# Debian's podman, a base image of Debian's packages, and docker/Dockerfile upon it. What is there already is used as it is.
#
#   docker/podman.sh [OPTION OF podman build]...
#
# for example --build-arg WHEELS=https://pypi.org/simple for GPUs; --secret id=pip,src=/etc/pip.conf for an index of one's own;
# --volume /wheels:/wheels:ro --build-arg WHEELS=file:///wheels for wheels that are on this machine.
#
#   FEDVISION_IMAGE    the image to make, fedvision:cpu
#   FEDVISION_BASE     what to make it on, localhost/fedvision-base:bookworm
#   DEBIAN_MIRROR      where Debian's packages come from, http://deb.debian.org/debian
#   CONTAINERS_CONF    podman's settings; on a machine without systemd docker/containers.conf if not set
set -eu
cd "$(dirname "$0")/.."
image=${FEDVISION_IMAGE:-fedvision:cpu}
base=${FEDVISION_BASE:-localhost/fedvision-base:bookworm}
[ -d /run/systemd/system ] || export CONTAINERS_CONF="${CONTAINERS_CONF:-$PWD/docker/containers.conf}"

# netavark calls iptables; catatonit is what `init: true` starts.
missing=
for package in podman runc netavark aardvark-dns iptables catatonit debootstrap; do
    dpkg --status "$package" >/dev/null 2>&1 || missing="$missing $package"
done
if [ -n "$missing" ]; then
    apt-get update --quiet
    # shellcheck disable=SC2086 # several words
    apt-get install --quiet --yes --no-install-recommends $missing
fi

if ! podman image exists "$base"; then
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
    debootstrap --variant=minbase --include=python3,python3-venv,openssl,procps,ca-certificates \
        bookworm "$root" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}"
    chmod 755 "$root" # it becomes the container's /
    tar --directory "$root" --exclude './var/cache/apt/*' --exclude './var/lib/apt/lists/*' --create . | podman import --quiet - "$base"
fi

podman build --file docker/Dockerfile --network host --build-arg BASE="$base" --tag "$image" "$@" .
