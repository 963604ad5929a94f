#!/bin/sh
# Install flanneld as a system service; `make install-system` calls this.
#
#   DESTDIR=   root of the tree to install into (a package being built); empty: this machine
#   PREFIX=    /usr/local
#   PYTHON=    /usr/bin/python3: the interpreter on the machine that will run it
#
# Everything is built beside the installed tree first and then put in its place by a rename, so that
# a build that fails changes nothing. Settings in /etc/default/flanneld are never overwritten.
set -eu
umask 022
export LC_ALL=C
cd "$(dirname "$0")/.."

DESTDIR=${DESTDIR-}
PREFIX=${PREFIX:-/usr/local}
PREFIX=${PREFIX%/}
PYTHON=${PYTHON:-/usr/bin/python3}

fail() {
	echo "install-system: $*" >&2
	exit 1
}

for path in "${DESTDIR:-/}" "$PREFIX"; do
	case $path in
	*[!A-Za-z0-9/._+-]*) fail "only letters, digits and / . _ + - in DESTDIR and PREFIX: $path" ;;
	/*) ;;
	*) fail "DESTDIR and PREFIX must be absolute paths: $path" ;;
	esac
done
case $PREFIX in
/usr | /usr/local) share=$PREFIX/lib ;; # systemd looks there
*) share=/etc ;;
esac
[ -n "$DESTDIR" ] || [ "$(id -u)" = 0 ] || fail "not root: use sudo, or set DESTDIR"
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || fail "$PYTHON is not Python 3.11 or later"
"$PYTHON" -c 'import ensurepip, os, sysconfig
assert os.path.exists(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null && command -v gcc >/dev/null ||
	fail "missing for the build: apt-get install python3-venv python3-dev gcc libc6-dev"

home=$PREFIX/lib/flanneld
new=$DESTDIR$PREFIX/lib/.flanneld.new
old=$DESTDIR$PREFIX/lib/.flanneld.old
trap 'rm -rf "$new"' EXIT
rm -rf "$new" "$old"
mkdir -p "$DESTDIR$PREFIX/lib" "$DESTDIR$PREFIX/sbin" "$DESTDIR$PREFIX/libexec"

echo "building $home"
"$PYTHON" -m venv "$new"
"$new/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile .
# An upgrade builds anew; and python-iptables starts slower where setuptools is.
"$new/bin/python" -m pip uninstall --quiet --yes setuptools pip
# The scripts' first lines, and what tells where the environment is.
pattern=$(printf %s "$new" | sed 's/[.]/[.]/g')
grep -rlIF "$new" "$new/bin" "$new/pyvenv.cfg" | xargs sed -i "s|$pattern|$home|g"
# A start without bytecode takes four times as long.
"$new/bin/python" -m compileall -q -s "$new" -p "$home" "$new/lib"

install_unit() { # SOURCE TARGET
	mkdir -p "$DESTDIR$(dirname "$2")"
	sed "s|@PREFIX@|$PREFIX|g" "systemd/$1" >"$DESTDIR$2.new"
	chmod 644 "$DESTDIR$2.new"
	mv "$DESTDIR$2.new" "$DESTDIR$2"
}

[ ! -e "$DESTDIR$home" ] || mv "$DESTDIR$home" "$old"
mv "$new" "$DESTDIR$home" || {
	[ ! -e "$old" ] || mv "$old" "$DESTDIR$home"
	fail "$DESTDIR$home cannot be put in place; the former one is back"
}
rm -rf "$old"
for command in flanneld mk-docker-opts; do
	[ -x "$DESTDIR$home/bin/$command" ] || fail "$command was not installed"
	ln -sf "../lib/flanneld/bin/$command" "$DESTDIR$PREFIX/sbin/$command"
done
install -m 755 systemd/flannel-docker "$DESTDIR$PREFIX/libexec/flannel-docker"
for unit in flanneld.service flannel-docker.service docker.service.d/flannel.conf; do
	install_unit "$unit" "$share/systemd/system/$unit"
done
install_unit tmpfiles.conf "$share/tmpfiles.d/flannel.conf"
if [ ! -e "$DESTDIR/etc/default/flanneld" ]; then
	mkdir -p "$DESTDIR/etc/default"
	install -m 644 systemd/flanneld.env "$DESTDIR/etc/default/flanneld"
fi

if [ -z "$DESTDIR" ] && [ -d /run/systemd/system ]; then
	systemctl daemon-reload
	systemd-tmpfiles --create flannel.conf
	echo "installed. Now: edit /etc/default/flanneld, then systemctl enable --now flanneld"
	echo "(after an upgrade: systemctl restart flanneld; it costs no packet; with udp those of about a second)"
fi
