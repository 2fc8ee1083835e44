"""Builds a datastore and its ScaNN indexes from images and a tokenizer; also appends, merges, verifies and measures.

python -m arrag_jax.build_datastore --config configs/emoji_datastore.py --workdir runs/store
python -m arrag_jax.build_datastore --config configs/folder_datastore.py --config.source=photos --workdir runs/photos
python -m arrag_jax.build_datastore --config configs/folder_datastore.py --config.source=more --workdir runs/p --append
python -m arrag_jax.build_datastore --merge runs/one --merge runs/two --workdir runs/both
python -m arrag_jax.build_datastore --merge runs/knowledge --excess_above=20 --workdir runs/cut
python -m arrag_jax.build_datastore --workdir runs/photos --verify
python -m arrag_jax.build_datastore --workdir runs/photos --report
python -m arrag_jax.build_datastore --workdir runs/photos --forget holiday/beach.jpg city.jpg
python -m arrag_jax.build_datastore --workdir runs/photos --purge
python -m arrag_jax.build_datastore --config.keys=codebook,latent --config.indexes=latent --workdir runs/photos

The last command adds keys and an index to an existing datastore. Without --config, the settings that the datastore was
built with apply. Captions can be added in the same way (--config.captions=True). The source must still exist,
unchanged.

--report measures the indexes: recall compared with exact search, queries per second, and bytes per patch. For hidden
keys it also counts the images of each source by their excess (docs/keys.md).

If you run it again with the same flags, it continues where it stopped, or says that nothing is left to do. Several
processes share the work (JAX_COORDINATOR_ADDRESS and so on, see launch/); --workdir must then be on a file system that
all processes can access. With --ray the command is started once, and the images are encoded on a Ray cluster, see
docs/clusters.md.
"""

import sys
from collections.abc import Collection
from pathlib import Path

import jax

from arrag_jax import huggingface
from arrag_jax.command import OPTIONAL_CONFIG, RAY, RAY_CORES, Flag, main_with_config
from arrag_jax.config import DatastoreConfig
from arrag_jax.errors import UserError
from arrag_jax.retrieval import build
from arrag_jax.store.dry_run import encoding_program
from arrag_jax.store.from_images import recorded_config
from arrag_jax.topology import TOPOLOGY, dry_run, open_topology
from arrag_jax.work import open_engine

ALL = -1e9  # value of --excess_above that every image exceeds, in bits


def run(
    config: DatastoreConfig | None,
    workdir: str,
    append: bool = False,
    merge: Collection[str] = (),
    verify: bool = False,
    report: bool = False,
    keep_duplicates: bool = False,
    excess_above: float = ALL,
    forget: Collection[str] = (),
    forget_list: str = "",
    rights: str = "",
    purge: bool = False,
    ray: str = "",
    ray_cores: int = RAY_CORES.default,
    topology: str = "",
) -> None:
    """Builds the datastore of the config in --workdir, or does what a flag requests; run it again to continue."""
    if topology:
        if config is None:
            raise UserError("missing --config (see --help)")
        opened = open_topology(topology)
        sys.exit(dry_run(opened, [encoding_program(config, opened)], Path(workdir)))
    forgets = bool(forget or forget_list)
    alone = (merge, verify, report, forgets, purge, rights)
    if jax.process_index() > 0 and any(alone):
        return  # process 0 alone does these
    if sum(map(bool, (append, *alone))) > 1:
        raise UserError("--append, --merge, --verify, --report, --forget, --rights and --purge exclude one another")
    if ray and (merge or verify or forgets or purge or rights):
        raise UserError("--merge, --verify, --forget, --rights and --purge run in one process; leave --ray out")
    if excess_above != ALL and not merge:
        raise UserError("--excess_above takes images from a finished datastore; name it: --merge=STORE")
    directory = Path(workdir)
    if verify:
        build.verify(directory)
    elif forgets:
        build.forget(directory, tuple(forget), forget_list)
    elif rights:
        build.record_rights(directory, Path(rights))
    elif purge:
        build.purge(directory)
    elif report:
        build.report(directory, config, ray)
    elif merge:
        build.merge(merge, directory, keep_duplicates, config, None if excess_above == ALL else excess_above)
    else:
        with open_engine(ray, ray_cores) as engine:
            build.build(config, directory, append, keep_duplicates, engine)


if __name__ == "__main__":
    main_with_config(
        run,
        DatastoreConfig,
        "apart",
        recorded=lambda flags: recorded_config(Path((flags["merge"] or [flags["workdir"]])[0])),
        config=OPTIONAL_CONFIG,
        workdir=Flag("folder of the datastore; made when absent", path=True, storage=True),
        report=Flag("measure the index in --workdir, print the figures and write them to report.json", False),
        append=Flag("add the images of config.source that the datastore does not hold yet", False),
        merge=Flag(
            "datastore to copy into --workdir; give it several times, in order", (), path=True, hub=huggingface.DATASET
        ),
        keep_duplicates=Flag(
            "keep all files of equal content, and images that --append or --merge finds a second time", False
        ),
        excess_above=Flag("with --merge: take only images with more excess, in bits per image (docs/keys.md)", ALL),
        forget=Flag("names of images that no search may find any more", (), several=True),
        forget_list=Flag("file with such names, one a line", "", path=True),
        rights=Flag(
            "record licences and sources of images: a file of lines {image, licence, source}, or the images' folder",
            "",
            path=True,
        ),
        purge=Flag("rewrite the datastore without the images that were forgotten", False),
        ray=RAY,
        ray_cores=RAY_CORES,
        topology=TOPOLOGY,
        verify=Flag("read every file in --workdir: exit 0, or the name of the damaged one", False),
    )
