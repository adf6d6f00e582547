"""Runs in clip-retrieval's environment: its inference on shards, as its documentation calls it.

python clip-retrieval.py CHECKPOINT OUT BATCH WORKERS SHARD...
"""

import sys

from clip_retrieval import clip_inference


def main() -> None:
    checkpoint, out, batch, workers, *shards = sys.argv[1:]
    clip_inference(
        # It takes one address with braces.
        input_dataset=shards[0] if len(shards) == 1 else "{" + ",".join(shards) + "}",
        output_folder=out,
        input_format="webdataset",
        batch_size=int(batch),
        num_prepro_workers=int(workers),
        enable_text=False,
        clip_model=f"open_clip:ViT-B-16-quickgelu/{checkpoint}",
        output_partition_count=1,
    )


if __name__ == "__main__":
    main()
