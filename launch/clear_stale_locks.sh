#!/usr/bin/env bash
# Removes the locks that killed builds of DeepSpeed's operators left behind; run it before every launch.
# DeepSpeed compiles an operator on first use under a file called `lock`. A build that is killed never removes it, and every later
# run then waits for it, silently and forever. A living build on this machine has the lock open, or is a compiler with the build
# folder as its working directory; a build on another machine that shares the folder is invisible from here, so on a network
# file system a lock must be an hour old, too.
set -euo pipefail

cache=${TORCH_EXTENSIONS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/torch_extensions}
[ -d "$cache" ] || exit 0
cache=$(realpath "$cache")

case $(stat -f -c %T "$cache") in
    nfs* | lustre | gpfs | ceph* | smb* | cifs | fuse* | beegfs* | afs) age=(-mmin +60) ;;
    *) age=() ;;
esac

in_use() { # is LOCK open, or its folder the working directory, in any process of this machine?
    grep -qxF -e "$1" -e "$(dirname "$1")" \
        <(find /proc/[0-9]*/cwd /proc/[0-9]*/fd -maxdepth 1 -type l -printf '%l\n' 2>/dev/null)
}

find "$cache" -name lock -type f "${age[@]}" | while read -r lock; do
    in_use "$lock" && continue
    rm -f "$lock"
    echo "removed the stale build lock $lock" >&2
done
