"""A manifest with the sha256 of every file of a folder: damage is named, never read.

Orbax does not notice a flipped bit in the values that it stores; the manifest does. It is also its
own witness: its text is the one way to write its content, and holds the digest of the rest.
"""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from peftjax import _disk

FORMAT = 1
MANIFEST = 'manifest.json'
FOREIGN = ('.bin', '.pt', '.pth', '.pkl', '.pickle', '.ckpt', '.npz', '.npy')


class CheckpointError(ValueError):
    """A saved folder is damaged, of another version, or not ours; the message names the file."""


def seal(folder: Path, writer: str) -> None:
    """Writes the manifest of all files that a folder now holds.

    Args:
      folder: where.
      writer: the program and version that wrote the files, for error messages.
    """
    files = {
        name: {'bytes': path.stat().st_size, 'sha256': _digest(path)}
        for name, path in _walk(folder).items()
    }
    _disk.write(folder / MANIFEST, _text(files, writer))


def verify(folder: Path, *, others: bool = False) -> None:
    """Checks that a folder holds exactly the files that were sealed, unchanged.

    Args:
      folder: where.
      others: whether files that were not sealed may lie beside them, such as a model card.

    Raises:
      CheckpointError: a file was changed, cut, deleted or added, or there is no manifest.
    """
    found = _walk(folder)
    if MANIFEST not in found:
        raise CheckpointError(_unsealed(folder, found))
    files = _read(found.pop(MANIFEST))
    wrong = [f'{str(folder / name)!r} is missing' for name in files if name not in found]
    if not others:
        wrong += [f'{str(p)!r} does not belong' for name, p in found.items() if name not in files]
    for name, path in found.items():
        want, size = files.get(name), path.stat().st_size
        if want is None:
            continue
        if size != want['bytes']:
            wrong.append(f'{str(path)!r} has {size} bytes, not {want["bytes"]}')
        elif _digest(path) != want['sha256']:
            wrong.append(f'{str(path)!r} was changed (its sha256 is another)')
    if wrong:
        more = f' and {len(wrong) - 10} more' if len(wrong) > 10 else ''
        raise CheckpointError(
            f'a saved folder must hold the files that were saved, unchanged: '
            f'{"; ".join(wrong[:10])}{more}. Take another copy, or save it again'
        )


def parse(path: Path) -> dict[str, Any]:
    """A JSON object from a file, of the format that this version reads.

    Raises:
      CheckpointError: it is not a JSON object, or of another format.
    """
    try:
        found = json.loads(path.read_bytes().decode('utf-8'))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f'{str(path)!r} must hold JSON; reading it ended with: {error}. '
            'Take another copy, or save it again'
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(f'{str(path)!r} must hold a JSON object; got {found!r:.80}')
    if found.get('format') != FORMAT or isinstance(found['format'], bool):
        raise CheckpointError(
            f'{str(path)!r} has format {found.get("format")!r:.80}, written by '
            f'{found.get("writer", "an unknown program")!r:.80}; this version of peftjax reads '
            f'format {FORMAT}. Use the version that wrote it, or save it again'
        )
    return found


def _read(path: Path) -> dict[str, Any]:
    found = parse(path)
    files = found.get('files')
    try:
        same = path.read_bytes() == _text(files, found.get('writer')).encode()
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same or not isinstance(files, dict) or not all(map(_is_entry, files.values())):
        raise CheckpointError(
            f'{str(path)!r} was changed after it was written. Take another copy, or save it again'
        )
    return files


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and {'bytes', 'sha256'} <= set(entry)


def _text(files: Any, writer: Any) -> str:
    """The one way to write a manifest: any other byte is a change."""
    body = {'format': FORMAT, 'writer': writer, 'files': files}
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, 'sha256': digest}, indent=1) + '\n'


def _digest(path: Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def _walk(folder: Path) -> dict[str, Path]:
    """All files below a folder by relative name; links and devices are refused, not followed."""
    found = {}
    for place, folders, names in os.walk(folder, followlinks=False, onerror=_raise):
        for name in (*folders, *names):
            path = Path(place, name)
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                found[path.relative_to(folder).as_posix()] = path
            elif not stat.S_ISDIR(mode):
                raise CheckpointError(
                    f'a saved folder must hold plain files; {str(path)!r} is '
                    f'{"a link" if stat.S_ISLNK(mode) else "a device or pipe"}. '
                    'Put the file itself there'
                )
    return dict(sorted(found.items()))


def _raise(error: OSError) -> None:
    raise error


def _unsealed(folder: Path, found: dict[str, Path]) -> str:
    """What to say of a folder without a manifest."""
    law = f'a saved folder must hold {str(folder / MANIFEST)!r}, which is missing'
    objects = sorted(name for name in found if name.endswith(FOREIGN))
    if objects:
        return (
            f'{law}. {objects[0]!r} may hold pickled objects, which are never opened: convert it '
            'to safetensors with the library that wrote it'
        )
    if 'adapter_config.json' in found:
        return f'{law}. It looks like an adapter of another library: pj.hf.load_adapter reads those'
    return f'{law}. Name a folder that peftjax.save wrote, or take another copy'
