"""``labels.json`` beside a dataset: what classes of its columns are called (column -> name -> class)."""

from __future__ import annotations

import logging
from pathlib import Path

from hypha.decoding import decode_json
from hypha.errors import Undecodable
from hypha.messages import ClassNames

logger = logging.getLogger(__name__)

LABELS_FILE = "labels.json"
#: beyond it nobody reads them, and a manifest has to be answered in one message
MAX_LABELS_BYTES = 1 << 20


def read_labels(directory: Path) -> tuple[ClassNames, ...]:
    """Of the dataset in ``directory``. A file that cannot be used is logged, and gives no names: nothing but
    the look of a trained model depends on them.
    """
    path = directory / LABELS_FILE
    try:
        if path.stat().st_size > MAX_LABELS_BYTES:
            logger.warning("%s is larger than %d bytes; classes go without names.", path, MAX_LABELS_BYTES)
            return ()
        columns = decode_json(path.read_bytes(), dict[str, dict[str, int]])
    except FileNotFoundError:
        return ()
    except OSError as exc:
        logger.warning("%s cannot be read (%s); classes go without names.", path, exc.strerror)
        return ()
    except Undecodable as exc:
        logger.warning("%s is not what prepare writes (%s); classes go without names.", path, exc)
        return ()
    found = []
    for column, ids in sorted(columns.items()):
        names = sorted(ids, key=lambda name: ids[name])
        if not names or [ids[name] for name in names] != list(range(len(names))):
            logger.warning(
                "%s does not number the classes of %s from 0 on; they go without names.", path, column
            )
            continue
        found.append(ClassNames(column=column, names=tuple(names)))
    return tuple(found)
