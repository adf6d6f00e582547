# Images for the report, beside those of the levels: real ones, the same seeds at each depth, and those of hierarchies that are trained
# already (`grid.pretrained`), with which it opens. Included by the Snakefile.


rule real_images:
    """Real images to stand beside the samples: rows of the store that they are scored against."""
    input:
        store(SCORED_STORE),
    output:
        directory("real/images"),
    params:
        shown=SHOWN,
        side=steps.image_side(plan),
    localrule: True
    shell:
        f"featurize images {REFERENCE} --count {{params.shown}} --size {{params.side}} --out {{output}}"


rule real_decoded:
    """The same as their z_0 decodes: no sample can be sharper."""
    input:
        store(SCORED_STORE),
    output:
        directory("real/decoded"),
    params:
        shown=SHOWN,
    resources:
        **GPU,
    shell:
        f"on_gpu nestgen decode --store {REFERENCE} --count {{params.shown}} --out {{output}}"


rule sheet:
    input:
        [f"samples/{cell.name}/sample.json" for cell in FIRST_SEED],
        CHOSEN,
    output:
        "samples.png",
    params:
        titles=",".join(f"L = {depth}" for depth in plan.depths),
        shown=SHOWN,
    localrule: True
    shell:
        f"nestgen sheet $(sigma_choice cells --prefix samples/ {' '.join(BEST)})"
        " --titles '{params.titles}' --count {params.shown} --out samples.png"


PRETRAINED = {one.stem: one for one in find_all(plan)}
SHOWCASE = next(reversed(PRETRAINED.values()), None)  # the deepest: its levels are frozen, to real images too if there are any
SHOWCASE_SHEETS = [name for name, options in SHEETS.items() if SHOWCASE and (SHOWCASE.source or not options)]


rule pretrained_sample:
    output:
        "pretrained/{stem}/sample.json",
        "pretrained/{stem}-sheet.png",
    params:
        name=lambda wildcards: PRETRAINED[wildcards.stem].name,
        digest=lambda wildcards: PRETRAINED[wildcards.stem].digest,
        out=lambda wildcards: f"pretrained/{wildcards.stem}",
    wildcard_constraints:
        stem="|".join(map(re.escape, PRETRAINED)) or "-",
    priority: 200
    resources:
        **GPU,
    shell:
        "OMP_NUM_THREADS={threads} on_gpu nestgen sample --overwrite --pretrained {params.name:q} --count 16"
        " --out {params.out:q}"


rule pretrained_sheet:
    input:
        lambda wildcards: [ROWS] if SHEETS[wildcards.sheet] else [],
    output:
        "pretrained/{sheet}.png",
    params:
        name=verbatim(SHOWCASE.name if SHOWCASE else ""),
        options=lambda wildcards: SHEETS[wildcards.sheet],
        digest=SHOWCASE.digest if SHOWCASE else "",
    wildcard_constraints:
        sheet="|".join(SHEETS),
    priority: 200
    resources:
        **GPU,
    shell:
        "OMP_NUM_THREADS={threads} on_gpu nestgen hierarchy --pretrained {params.name:q}{params.options} --out {output}"


if SHOWCASE and SHOWCASE.source:

    rule pretrained_rows:
        """Real images in the levels of the deepest."""
        output:
            directory(ROWS),
        params:
            source=SHOWCASE.source,
            settings=verbatim(str(SHOWCASE.settings)),
            digest=SHOWCASE.digest,
        priority: 200
        resources:
            **GPU,
        shell:
            f"on_gpu featurize extract {{params.source:q}} --split val --limit {COUNT} --recipe {{params.settings:q}} --out {{output}}"
            " --workers 0"

    rule pretrained_images:
        input:
            ROWS,
        output:
            directory("pretrained/real/images"),
        params:
            side=SHOWCASE.side,
        localrule: True
        shell:
            f"featurize images {{input}} --count {COUNT} --size {{params.side}} --out {{output}}"

    rule pretrained_decoded:
        input:
            ROWS,
        output:
            directory("pretrained/real/decoded"),
        params:
            name=verbatim(SHOWCASE.name),
        resources:
            **GPU,
        shell:
            f"on_gpu nestgen decode --pretrained {{params.name:q}} --store {{input}} --count {COUNT} --out {{output}}"


SHOWN_FIRST = [f"pretrained/{stem}/sample.json" for stem in PRETRAINED]
SHOWN_FIRST += [f"pretrained/{sheet}.png" for sheet in SHOWCASE_SHEETS]
SHOWN_FIRST += ["pretrained/real/images", "pretrained/real/decoded"] if SHOWCASE and SHOWCASE.source else []
