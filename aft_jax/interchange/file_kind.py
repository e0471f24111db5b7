"""The kind of a file of weights, judged by its content: endings such as .bin and .ckpt are used for several kinds."""

import json
import zipfile
from pathlib import Path

from aft_jax.errors import UserError

SAFETENSORS, TORCH = 'safetensors', 'torch'
HEAD_BYTES = 512
# A safetensors file begins with the length of its header, 8 bytes, and the header, which is JSON.
LARGEST_HEADER = 10**8
HDF5 = b'\x89HDF\r\n\x1a\n'
# ONNX is a protocol buffer: field 1 (the version, a small number), then field 2 (the name of its producer).
ONNX = b'\x08', b'\x12'
STATE_DICT = 'give its state dict, saved by torch.save(model.state_dict(), path)'


def file_kind(path: Path) -> str:
    """Returns SAFETENSORS or TORCH.

    Raises:
        UserError: The file is missing, empty or of a known kind that holds no state dict. The message says what it is.
    """
    if path.is_dir():
        raise UserError(f'{path} is a directory; name the file in it that holds the weights.')
    try:
        with path.open('rb') as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}).') from error
    if not head:
        raise UserError(f'{path} is empty.')
    if other := _other_kind(path, head):
        raise UserError(f'{path} is {other}.')
    if head[8:9] == b'{' and int.from_bytes(head[:8], 'little') < LARGEST_HEADER:
        return SAFETENSORS
    is_torch = head.startswith((b'PK', b'\x80'))
    return SAFETENSORS if path.suffix == '.safetensors' and not is_torch else TORCH


def _other_kind(path: Path, head: bytes) -> str:
    """Describes a file that holds no state dict, with the way out; '' if it may hold one."""
    if head.startswith(b'version https://git-lfs'):
        return "a pointer of Git LFS, and not the file itself; fetch the file with 'git lfs pull'"
    if head.lstrip().lower().startswith((b'<!doctype', b'<html')):
        return 'a web page, probably in place of a download that needs a login; download the file again'
    if head.startswith(HDF5):
        return f'an HDF5 file, as Keras writes it; only networks of PyTorch can be read: {STATE_DICT}'
    if head[:1] == ONNX[0] and head[2:3] == ONNX[1]:
        return f'an ONNX model; {STATE_DICT}'
    return _other_archive(path) if head.startswith(b'PK') else ''


def _other_archive(path: Path) -> str:
    """Describes a zip archive that holds no state dict; '' if it may hold one, or is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return ''
    if any('/code/' in name or name.endswith('constants.pkl') for name in names):
        return 'a TorchScript archive; give its state dict, saved by torch.save(torch.jit.load(path).state_dict(), new)'
    if {'config.json', 'metadata.json'} <= set(names):
        return f'a Keras archive; only networks of PyTorch can be read: {STATE_DICT}'
    return ''


def check_folder(path: Path) -> None:
    """Checks that a folder is not one of the known kinds that are no work directory of a run.

    Raises:
        UserError: It is a folder of Hugging Face or a SavedModel of TensorFlow.
    """
    if (path / 'saved_model.pb').is_file():
        raise UserError(f'{path} is a SavedModel of TensorFlow; only networks of PyTorch can be read: {STATE_DICT}.')
    try:
        content = json.loads((path / 'config.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return
    if isinstance(content, dict) and {'model_type', 'architectures'} & content.keys():
        names = sorted(file.name for file in path.iterdir() if file.suffix in ('.safetensors', '.bin'))
        advice = f'name its file of weights, init_from={path / names[0]}' if names else 'it has no file of weights'
        raise UserError(f'{path} is a folder of a Hugging Face model ({content.get("model_type")}); {advice}.')
