#!/bin/sh
# submit.sh THREADS MEGABYTES GPUS SCRIPT: starts a Kubernetes Job that runs Snakemake's job script, and prints its name.
set -eu
sed -e "s|THREADS|$1|" -e "s|MEMORY|$2|" -e "s|GPUS|$3|" -e "s|SCRIPT|$4|" \
    -e "s|IMAGE|$NESTED_IMAGE|" -e "s|CLAIM|$NESTED_CLAIM|" "$(dirname "$0")/pod.yaml" | kubectl create -f - -o name
