#!/bin/sh
# status.sh JOB: how a Kubernetes Job is, in the words that Snakemake's generic executor knows.
set -eu
conditions=$(kubectl get "$1" --ignore-not-found -o 'jsonpath=there {.status.conditions[?(@.status=="True")].type} ')
case $conditions in
    *" Complete "*) echo success ;;
    *" Failed "* | "") echo failed ;;      # or deleted by someone
    *) echo running ;;
esac
