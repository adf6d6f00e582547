"""The Python of the workflow; `pipelines/Snakefile` says which step runs when.

plan          a recipe's section `grid`: which hierarchies are trained, sampled and scored, and their names
steps         what the Snakefile takes from a plan: paths of files, options of commands
rehearsal     the recipe that is run: as given, with keys of --config in it, or made small
sigma_choice  chooses σ by the scores of a depth, for the steps that follow
run           runs a recipe to its end by Snakemake (`make run`); story is what it tells on the way
running       what a killed workflow left behind: Snakemake's locks, and steps to wait for, each begun by step
report        one experiment as a page, report.html; its sentences follow the numbers, its charts the page's colours
pretrained    hierarchies that are trained already, with which a report opens
evidence      copies the results of an experiment to pipelines/results, for
results       a page per recipe: the paper's numbers beside the measured ones

Imports: `nestgen`'s public functions, never `featurize`; both packages' work is done by their commands.
"""
