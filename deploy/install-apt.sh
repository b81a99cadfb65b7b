#!/bin/sh
# Installs those of the listed Debian packages that are missing, without starting their services.
#   usage: deploy/install-apt.sh LIST...
# A list has one package a line; # begins a comment. Without root it only says what is missing, and fails.
set -eu

policy=/usr/sbin/policy-rc.d

missing() {
    sed 's/#.*//' "$@" | while read -r package; do
        [ -z "$package" ] || installed "$package" || printf '%s ' "$package"
    done
}

installed() {
    [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# strongSwan would take UDP 500 and 4500 of this machine, nginx TCP 80: policy-rc.d is Debian's way to refuse.
hold_services() {
    [ -e "$policy" ] && return
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
}

wanted=$(missing "$@")
[ -n "$wanted" ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "Missing, and only root on Debian can install them: $wanted" >&2
    exit 1
fi

hold_services
export DEBIAN_FRONTEND=noninteractive
apt-get -qq update
# shellcheck disable=SC2086 # the names are words
apt-get -qq install --yes --no-install-recommends $wanted
