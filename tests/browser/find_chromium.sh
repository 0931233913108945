#!/bin/sh
# Is there a Chromium for the browser checks? Install Debian's where that is possible; otherwise say so and fail.
for name in chromium chromium-browser google-chrome; do
  command -v "$name" >/dev/null 2>&1 && exit 0
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "installing Chromium for the browser checks"
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null && exit 0
fi
echo "no Chromium found: the browser checks will be skipped (install chromium to run them)"
exit 1
