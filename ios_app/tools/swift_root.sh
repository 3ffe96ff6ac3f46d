#!/usr/bin/env bash
# A Debian trixie root with the Swift compiler, for machines whose own Debian is older: sets it up once (as root, 2.7 GB, minutes), and
# runs commands in it.
# Run as: swift_root.sh setup | swift_root.sh path | swift_root.sh run COMMAND [ARGUMENT...]
# The root lies in $CFMOE_SWIFT_ROOT, or in the user's cache directory. `run` shows it the directories of $CFMOE_SWIFT_BINDS
# (colon-separated), read-write, under their own names, goes to the current directory if it is in one of them, and passes on
# LD_LIBRARY_PATH and what begins with CFMOE_.
set -euo pipefail
root=${CFMOE_SWIFT_ROOT:-${XDG_CACHE_HOME:-$HOME/.cache}/cfmoe/swift-trixie}
mirror=${CFMOE_DEBIAN_MIRROR:-http://deb.debian.org/debian}
packages=swiftlang,libc6-dev,libstdc++-14-dev,zlib1g-dev,git,binutils

fail() {
  echo "error: $*" >&2
  exit 2
}

setup() {
  [ -e "$root/.complete" ] && return
  [ "$(id -u)" = 0 ] || fail "the Swift root needs root to be set up: run sudo CFMOE_SWIFT_ROOT=$root $0 setup"
  if ! command -v debootstrap >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends debootstrap
  fi
  local partial="$root.partial"
  mkdir -p "$(dirname "$root")"
  exec 9>"$root.lock"
  flock 9
  [ -e "$root/.complete" ] && return
  # What an interrupted set-up left is thrown away: debootstrap does not take up its own work.
  rm -rf "$partial" "$root"
  # In a mount namespace of its own, so that nothing stays mounted if it is killed.
  unshare --mount --propagation private debootstrap --variant=minbase --include="$packages" trixie "$partial" "$mirror" >"$root.log" 2>&1 ||
    fail "debootstrap of trixie from $mirror failed: $(tail -n 1 "$root.log"); the whole log is $root.log"
  rm -rf "$partial"/var/cache/apt/archives/*.deb "$partial"/var/lib/apt/lists/*
  touch "$partial/.complete"
  mv "$partial" "$root"
}

run() {
  [ -e "$root/.complete" ] || fail "there is no Swift root at $root: run $0 setup"
  [ "$(id -u)" = 0 ] || fail "commands in the Swift root need root, for they change the root directory"
  # A mount namespace of its own: what is mounted goes when the command ends, however it ends.
  exec unshare --mount --propagation private bash -c '
    set -euo pipefail
    root=$1 here=$2
    shift 2
    mount --bind /dev "$root/dev"
    mount -t proc proc "$root/proc"
    IFS=: read -ra binds <<<"${CFMOE_SWIFT_BINDS:-}"
    for directory in "${binds[@]}"; do
      [ -n "$directory" ] || continue
      mkdir -p "$root$directory"
      mount --bind "$directory" "$root$directory"
    done
    [ -d "$root$here" ] || here=/
    keep=(PATH=/usr/local/bin:/usr/bin:/bin HOME=/root LANG=C.UTF-8)
    while IFS= read -r -d "" variable; do
      case $variable in CFMOE_* | LD_LIBRARY_PATH=*) keep+=("$variable") ;; esac
    done < <(env -0)
    exec chroot "$root" /usr/bin/env -i "${keep[@]}" bash -c "cd \"\$0\" && exec \"\$@\"" "$here" "$@"
  ' swift_root "$root" "$PWD" "$@"
}

case ${1:-} in
  setup) setup ;;
  path) echo "$root" ;;
  run)
    shift
    [ $# -gt 0 ] || fail "run needs a command"
    run "$@"
    ;;
  *) fail "usage: $0 setup | path | run COMMAND [ARGUMENT...]" ;;
esac
