"""Builds a datastore from images and a tokenizer, and its ScaNN indexes; adds to one, merges and verifies them.

python -m arrag_jax.build_datastore --config configs/emoji_datastore.py --workdir runs/store
python -m arrag_jax.build_datastore --config configs/folder_datastore.py --config.source=photos --workdir runs/photos
python -m arrag_jax.build_datastore --config configs/folder_datastore.py --config.source=more --workdir runs/p --append
python -m arrag_jax.build_datastore --merge runs/one --merge runs/two --workdir runs/both
python -m arrag_jax.build_datastore --workdir runs/photos --verify
python -m arrag_jax.build_datastore --workdir runs/photos --report
python -m arrag_jax.build_datastore --config.keys=codebook,latent --config.indexes=latent --workdir runs/photos

The last adds keys and an index to a datastore that is there: with no --config its own settings count, as they were when
it was built. Captions (--config.captions=True) can be added alike. The source must still be there, unchanged.
--report measures the index: recall against exact search, queries a second, bytes a patch.
Run again with the same flags, it goes on where it stopped, and says so when nothing is left to do. Started as several
processes (JAX_COORDINATOR_ADDRESS and so on, see launch/) it shares the work; --workdir is then on a file system that
all of them see.
"""

from collections.abc import Collection
from pathlib import Path

import jax

from arrag_jax.command import OPTIONAL_CONFIG, Flag, main_with_config
from arrag_jax.config import DatastoreConfig
from arrag_jax.errors import UserError
from arrag_jax.retrieval import build
from arrag_jax.retrieval.scann import BY_RULE
from arrag_jax.store.from_images import recorded_config


def run(
    config: DatastoreConfig | None,
    workdir: str,
    append: bool = False,
    merge: Collection[str] = (),
    verify: bool = False,
    report: bool = False,
    keep_duplicates: bool = False,
) -> None:
    """Builds the datastore that the config describes, in --workdir; run again to continue."""
    if jax.process_index() > 0 and (merge or verify or report):
        return  # the first process does these alone
    if sum(map(bool, (append, merge, verify, report))) > 1:
        raise UserError("--append, --merge, --verify and --report exclude one another; give one of them")
    directory = Path(workdir)
    if verify:
        build.verify(directory)
    elif report:
        build.report(directory, BY_RULE if config is None else config.scann)
    elif merge:
        build.merge(merge, directory, keep_duplicates, config)
    else:
        build.build(config, directory, append, keep_duplicates)


if __name__ == "__main__":
    main_with_config(
        run,
        DatastoreConfig,
        "apart",
        recorded=lambda flags: recorded_config(Path((flags["merge"] or [flags["workdir"]])[0])),
        config=OPTIONAL_CONFIG,
        workdir=Flag("folder of the datastore; made when absent", path=True),
        report=Flag("measure the index in --workdir, print the figures and write them to report.json", False),
        append=Flag("add the images of config.source that the datastore does not hold yet", False),
        merge=Flag("datastore to copy into --workdir; give it several times, in order", (), path=True),
        keep_duplicates=Flag("take files of equal content all, and what --append and --merge find twice", False),
        verify=Flag("read every file in --workdir: exit 0, or the name of the damaged one", False),
    )
