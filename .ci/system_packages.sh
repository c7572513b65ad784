#!/usr/bin/env bash
# Install the few Debian packages that xopt and its tests use; what is present is left alone.
#   g++                      links compiled models
#   g++-aarch64-linux-gnu    links compiled models for ARM
#   qemu-user-static         runs them here, in the tests
#   chromium                 opens the report, in a test
set -euo pipefail

declare -A package_of=(
  [g++]=g++
  [aarch64-linux-gnu-g++]=g++-aarch64-linux-gnu
  [qemu-aarch64-static]=qemu-user-static
  [chromium]=chromium
)

missing=()
for command in "${!package_of[@]}"; do
  command -v "$command" >/dev/null || missing+=("${package_of[$command]}")
done
if ((${#missing[@]} == 0)); then
  exit 0
fi

elevate=()
if ((EUID != 0)); then
  elevate=(sudo)
fi
if ! command -v apt-get >/dev/null || ! command -v "${elevate[0]:-env}" >/dev/null; then
  echo "Please install: ${missing[*]} (tests that need them are skipped without; g++ is needed to compile models)" >&2
  exit 0
fi
echo "Installing Debian packages: ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
"${elevate[@]}" apt-get update -qq
"${elevate[@]}" apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
