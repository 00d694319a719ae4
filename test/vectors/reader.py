"""A reader of the EigenLoRA pack, version 1.2, written from SPEC.md alone.

Nothing of the project's own code was looked at. Every rule is followed as literally as the text allows; where the text
leaves a choice, a comment that begins with "Reading:" says which one was made. Python 3.11 and numpy, nothing else.

    pack = open_pack(data, integrity="sha256-…", keys=["ed25519:…"])   # window, directory, bases
    task = load_task(pack, 0)                                          # a task of the pack
    task = load_task_file(pack, data, keys=[…])                        # or of a file of its own
    delta(task.terms[0])                                               # ΔW [out, in]
    apply_task(task, base)                                             # the base's parameters with the task

    reader.py INDEX_DIR             checks every entry of INDEX_DIR/index.json and apply.json; exit code 0 when all agree
    reader.py INDEX_DIR --musts     switches off one rule after the other; exit code 0 when some entry notices each
    reader.py --meanings            reads lines of {"pack", "task"} in base64 from stdin and writes what each means, as JSON
"""

import ast
import base64
import hashlib
import json
import math
import struct
import sys
import unicodedata
from dataclasses import make_dataclass
from functools import partial
from pathlib import Path

import numpy as np

PACK_MAGIC = bytes.fromhex("89454947454E0D0A")
TASK_MAGIC = bytes.fromhex("89455441534B0D0A")
WINDOW = 1536
MAX_SAFE = 2**53 - 1
MAX_DIM = 2**31 - 1
MOST = 2**16
MAX_ITEMS = 65_536
BASES, BLOB, FREE, CODED = 1, 2, 3, 3  # CODED is added to the kind of a coded section
COLUMN, FLAT = 1, 2
INT_BITS = {3: 8, 4: 4, 5: 3}
ROLES = ("saved", "bias", "bias-delta", "rows")
OF_MODULES = ("magnitude", "private", "own-A", "own-B")


def record(name, fields):
    """A class with these attributes; the last ones may be left out, and are None then."""
    return make_dataclass(name, [(x, object, None) for x in fields.split()])


class Refused(Exception):
    """A file that breaks a rule; `section` is that of SPEC.md in which the rule stands, `rule` tells it from all others."""

    def __init__(self, section, message, rule):
        super().__init__(f"section {section}: {message}")
        self.section, self.rule = section, rule


# Functions that check what many rules ask for: there a rule is one call of them.
CHECKS = ("u64", "integer", "number", "string", "boolean", "array", "mapping")
# The rule that is switched off, for `--musts`: the line of a call of `need`, or of a function of CHECKS.
off = None


def need(condition, section, message):
    """A rule. Nothing happens where it is kept, or switched off."""
    if condition:
        return
    frame = sys._getframe(1)
    while frame.f_code.co_name in CHECKS:
        frame = frame.f_back
    if frame.f_lineno != off:
        raise Refused(section, message, frame.f_lineno)


# ---- 1. Conventions --------------------------------------------------------------------------------------------------


def up(x, multiple):
    """⌈x⌉ to a multiple."""
    return -(-x // multiple) * multiple


def u16(raw, at):
    return int.from_bytes(raw[at : at + 2], "little")


def u32(raw, at):
    return int.from_bytes(raw[at : at + 4], "little")


def u64(raw, at):
    value = int.from_bytes(raw[at : at + 8], "little")
    need(value <= MAX_SAFE, "1", "a u64 above 2^53 - 1")
    return value


def crc_of(x):
    for _ in range(8):
        x = x >> 1 ^ (0x82F63B78 if x & 1 else 0)
    return x


CRC_TABLE = [crc_of(x) for x in range(256)]


def crc32c(raw):
    crc = 0xFFFFFFFF
    for byte in raw:
        crc = CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


class MessagePack:
    """Decodes one value that fills `raw` exactly. Integers and floats come as int and float, see `integer`."""

    FIXED = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
             0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}  # fmt: skip
    COUNTED = {0xD9: ("str", ">B"), 0xDA: ("str", ">H"), 0xDB: ("str", ">I"), 0xDC: ("array", ">H"),
               0xDD: ("array", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I")}  # fmt: skip

    def __init__(self, raw):
        self.raw, self.at, self.collections = raw, 0, 0

    @classmethod
    def decode(cls, raw, depth=0):
        self = cls(raw)
        value = self.value(depth)
        need(self.at == len(raw), "1", "bytes behind a MessagePack value")
        return value

    def take(self, n):
        need(n <= len(self.raw) - self.at, "1", "a MessagePack value that is cut off")
        self.at += n
        return self.raw[self.at - n : self.at]

    def number(self, form):
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self, depth):
        """The next value, which lies inside `depth` maps and arrays."""
        need(depth <= 16, "1", "a value inside more than 16 maps and arrays")
        code = self.take(1)[0]
        if code < 0x80:
            return code
        if code >= 0xE0:
            return code - 256
        if code < 0x90:
            return self.map(code & 15, depth)
        if code < 0xA0:
            return self.array(code & 15, depth)
        if code < 0xC0:
            return self.str(code & 31, depth)
        if code in (0xC0, 0xC2, 0xC3):
            return {0xC0: None, 0xC2: False, 0xC3: True}[code]
        if code in self.FIXED:
            return self.number(self.FIXED[code])
        need(code in self.COUNTED, "1", f"MessagePack format {code:#x}")
        kind, form = self.COUNTED[code]
        return getattr(self, kind)(self.number(form), depth)

    def str(self, n, _depth):
        try:
            return self.take(n).decode("utf-8")
        except UnicodeDecodeError:
            need(False, "1", "a string that is not UTF-8")
            return ""

    def open(self, least_bytes):
        # Implied: the items of such a count would be cut off. It keeps a reader from allocating for them.
        need(least_bytes <= len(self.raw) - self.at, "1", "a count that the bytes behind it do not hold")
        self.collections += 1
        need(3 * (self.collections - 1024) <= len(self.raw), "1", "too many maps and arrays")

    def array(self, n, depth):
        self.open(n)
        return [self.value(depth + 1) for _ in range(n)]

    def map(self, n, depth):
        self.open(2 * n)
        result = {}
        for _ in range(n):
            key = self.value(depth + 1)
            need(isinstance(key, str), "1", "a map key that is not a string")
            need(key not in result, "1", f"the key {key!r} twice")
            result[key] = self.value(depth + 1)
        return result


def integer(value, least, most, section, what):
    """Any integer format, or a float with an integral value."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    fits = type(value) is int and least <= value and (most is None or value <= most)
    need(fits, section, f"{what} is no integer from {least} to {most}")
    return value


def number(value, above, most, section, what):
    """A number above the one and at most the other."""
    need(type(value) in (int, float) and above < value <= most, section, f"{what} is no number above {above}, up to {most}")
    return value


def string(value, least, most, section, what):
    fits = isinstance(value, str) and least <= len(value.encode()) <= most
    need(fits, section, f"{what} is no string of {least} to {most} bytes")
    return value


def boolean(value, section, what):
    """Reading: `true` and `false` of MessagePack only, not 1 and 0; nil is the default, false."""
    need(value in (None, True, False) and type(value) in (type(None), bool), section, f"{what} is not a boolean")
    return bool(value)


def array(value, least, most, section, what):
    fits = isinstance(value, list) and least <= len(value) <= most
    need(fits, section, f"{what} is no array of {least} to {most} items")
    return value


def mapping(value, section, what):
    need(isinstance(value, dict), section, f"{what} is not a map")
    return value


# ---- 2. Window -------------------------------------------------------------------------------------------------------

# directory, bases: offset and length; signature: public key and signature, or None
Superblock = record("Superblock", "generation committed directory bases directory_crc signature")


def is_whole(block, parity):
    generation = int.from_bytes(block[:8], "little")
    unsigned = u32(block, 52) == 0 and not any(block[64:164])
    return (
        generation >= 1
        and generation % 2 == parity
        and crc32c(block[:60]) == u32(block, 60)
        and (unsigned or (u32(block, 52) != 0 and crc32c(block[:160]) == u32(block, 160)))
    )


def read_superblock(block):
    flag = u32(block, 52)
    need(flag in (0, 1), "2", "unknown flags in the superblock")
    need(not any(block[56:60]) and not any(block[164:]), "2", "reserved bytes of the superblock are not zero")
    generation, committed, *places = (u64(block, at) for at in range(0, 48, 8))
    signature = (block[64:96], block[96:160]) if flag else None
    return Superblock(generation, committed, tuple(places[:2]), tuple(places[2:]), u32(block, 48), signature)


def read_window(data):
    """The basis id and the superblock to use."""
    # Implied: no superblock is whole then, or the file is truncated.
    need(len(data) >= WINDOW, "2", "shorter than a window")
    need(data[:8] == PACK_MAGIC, "2", "another magic")
    need(u16(data, 8) == 1, "2", "another major version")
    need(u32(data, 12) == WINDOW, "2", "another length of the window")
    need(crc32c(data[:48]) == u32(data, 48), "2", "the CRC of the window's head")
    need(not any(data[52:512]), "2", "reserved bytes of the window's head are not zero")
    blocks = [data[512:1024], data[1024:1536]]
    whole = [block for parity, block in enumerate(blocks) if is_whole(block, parity)]
    need(whole, "2", "neither superblock is whole")
    superblock = read_superblock(max(whole, key=lambda block: int.from_bytes(block[:8], "little")))
    need(len(data) >= superblock.committed, "2", "truncated")
    return data[16:48], superblock


# ---- 4. Directory ----------------------------------------------------------------------------------------------------

Section = record("Section", "kind offset length crc hash coded")
Side = record("Side", "kind K rank mean type width E M")  # E, M: components [K, width], mean [width], from the bases
Module = record("Module", "name out inner layout kernel A B has_fingerprint fingerprint")  # inner: `in`
Entry = record("Entry", "id adapter_bytes metadata brings section")  # brings: None when it is not said
Pack = record("Pack", "data basis_id superblock sections modules entries revoked description found_id root")


def read_table(raw, n, hashed, superblock, coded_directory):
    """Sections 4 and 4.1: the table in a directory of right length, its hashes and the tiling of the file."""
    sections, behind = [], WINDOW
    for i in range(n):
        row = raw[16 + 32 * i : 48 + 32 * i]
        # Implied: sections with such places do not tile the file.
        kind, flag, offset, length = u32(row, 0), u32(row, 4), u64(row, 8), u64(row, 16)
        coded = kind in (BASES + CODED, BLOB + CODED)
        kind -= CODED if coded else 0
        if coded_directory:
            need(offset == 0, "4", "a coded directory that says where a section is")
            if up(behind, 64) == superblock.directory[0]:
                behind = sum(superblock.directory)
            offset = superblock.bases[0] if kind == BASES else up(behind, 64)
            behind = offset + length
        sha = raw[len(raw) - 32 * (n - i) :][:32] if hashed else None
        need(flag in (0, 1), "4.1", "unknown flags of a section")
        need(flag or kind not in (BASES, BLOB), "4.1", "a task blob or the bases are not required")
        need(not flag or kind != FREE, "4.1", "a free section that is required")
        need(not flag or kind in (BASES, BLOB, FREE), "4.1", "a required section of unknown kind")
        need(length or (kind == BASES and not coded), "4.1", "an empty section")
        need(u32(row, 28) == 0, "4.1", "a reserved byte of a section is not zero")
        need(kind != FREE or u32(row, 24) == 0, "4.1", "a free section with a CRC")
        need(kind != FREE or not any(sha or b""), "4", "a free section with a hash")
        sections.append(Section(kind, offset, length, u32(row, 24), sha, coded))
    bases = [(s.offset, s.length) for s in sections if s.kind == BASES]
    need(len(bases) == 1, "4.1", "not one bases section")
    need(bases[0] == superblock.bases, "4.1", "superblock and table disagree about the bases")
    places = [(s.offset, s.length) for s in sections]
    places.insert(sum(place < superblock.directory for place in places), superblock.directory)
    end = WINDOW
    for offset, length in places:
        need(offset == up(end, 64), "4.1", "sections that do not tile the file")
        end = offset + length
    need(end == superblock.committed, "4.1", "the last section does not end at the committed length")
    return sections


def read_side(value, width, what):
    side = mapping(value, "4.2", what)
    kind = integer(side.get("kind"), 1, 2, "4.2", f"kind of {what}")
    mean = boolean(side.get("mean"), "4.2", f"mean of {what}")
    K = integer(side.get("K"), 0, 65_535, "4.2", f"K of {what}")
    need(K or mean, "4.2", f"{what} has neither components nor a mean")
    rank = side.get("rank")
    if kind == FLAT:
        rank = integer(rank, 1, 65_535, "4.2", f"rank of {what}")
    need(kind == FLAT or rank is None, "4.2", f"{what} is of columns and has a rank")
    explained = side.get("explained")
    fits = explained is None or (type(explained) in (int, float) and 0 <= explained <= 1)
    need(fits, "4.2", f"explained of {what}")
    tensor_type = integer(side.get("type"), 0, 5, "5", f"tensor type of {what}")
    return Side(kind, K, rank, mean, tensor_type, width * (rank or 1))


def read_bases_of(value, width, what):
    """The bases of a side: none, one, or an array of them."""
    if value is None:
        return []
    some = array(value, 1, MAX_ITEMS, "4.2", what) if isinstance(value, list) else [value]
    return [read_side(one, width, what) for one in some]


def read_module(value):
    module = mapping(value, "4.2", "a module")
    name = string(module.get("name"), 1, 1024, "4.2", "name of a module")
    out = integer(module.get("out"), 1, MAX_DIM, "4.2", f"out of {name}")
    inner = integer(module.get("in"), 1, MAX_DIM, "4.2", f"in of {name}")
    layout = integer(module.get("layout"), 0, 3, "4.2", f"layout of {name}")
    kernel = module.get("kernel")
    if layout == 2:
        kernel = [integer(k, 1, 65_535, "4.2", "a kernel") for k in array(kernel, 1, 8, "4.2", f"kernel of {name}")]
        need(inner % math.prod(kernel) == 0, "4.2", f"kernel of {name} does not divide in")
    need(layout == 2 or kernel is None, "4.2", f"{name} is no convolution and has a kernel")
    A, B = (read_bases_of(module.get(key), width, f"{key} of {name}") for key, width in (("A", inner), ("B", out)))
    return Module(name, out, inner, layout, kernel, A, B, boolean(module.get("fingerprint"), "4.2", "fingerprint"))


def read_description(raw):
    basis = mapping(MessagePack.decode(raw), "4.2", "the basis description")
    for key, most in (("producer", 1024), ("mode", 64), ("gauge", 64), ("centering", 64)):
        string(basis.get(key), 1, most, "4.2", key)
    if basis.get("rank") is not None:
        integer(basis["rank"], 1, 65_535, "4.2", "rank")
    if basis.get("step") is not None:
        number(basis["step"], 0, 16, "4.2", "step")
    if basis.get("error") is not None:
        number(basis["error"], 0, 1, "4.2", "error")
    if basis.get("baseModel") is not None:
        string(basis["baseModel"], 1, 4096, "4.2", "baseModel")
    modules = [read_module(m) for m in array(basis.get("modules"), 0, MAX_ITEMS, "4.2", "modules")]
    need(len({m.name for m in modules}) == len(modules), "4.2", "two modules of one name")
    return modules


def read_brings(value):
    """A set of (role, name)."""
    result = set()
    for item in array(value, 0, MAX_ITEMS, "4.3", "brings"):
        role, space, name = string(item, 1, 1035, "4.3", "an item of brings").partition(" ")
        # Implied where the blob is loaded: it brings nothing of the kind. An entry may be refused sooner.
        need(space and name and role in (*ROLES, *OF_MODULES), "4.3", "no role and name in brings")
        need((role, name) not in result, "4.3", "brings names something twice")
        result.add((role, name))
    return frozenset(result)


def read_entry(value, earlier):
    """An entry of the task list, or with `earlier` None that of a task file, where `brings` is no index."""
    entry = mapping(value, "4.3", "a task")
    name = string(entry.get("id"), 1, 255, "4.3", "id")
    need(all(unicodedata.category(c) != "Cc" for c in name), "4.3", "a control character in an id")
    adapter_bytes = integer(entry.get("adapterBytes"), 0, MAX_SAFE, "4.3", "adapterBytes")
    metadata = entry.get("metadata")
    metadata = {} if metadata is None else mapping(metadata, "4.3", "metadata")
    if metadata.get("labels") is not None:
        for label in array(metadata["labels"], 1, MAX_ITEMS, "4.3", "labels"):
            string(label, 1, 1024, "4.3", "a label")
    for key in ("license", "origin"):
        if metadata.get(key) is not None:
            string(metadata[key], 1, 4096, "4.3", key)
    brings = entry.get("brings")
    if isinstance(brings, (int, float)):
        need(earlier is not None, "7", "brings of a task file is an index")
        brings = earlier[integer(brings, 0, len(earlier) - 1, "4.3", "brings")].brings
    elif brings is not None:
        brings = read_brings(brings)
    return Entry(name, adapter_bytes, metadata, brings)


def read_task_list(raw, blobs):
    # Implied for all files of a usual size.
    need(len(blobs) <= 262_144, "10", "too many tasks")
    tasks = array(MessagePack.decode(raw), len(blobs), len(blobs), "4.3", "the task list, an item for each blob")
    entries = []
    for task, section in zip(tasks, blobs):
        entries.append(read_entry(task, entries))
        entries[-1].section = section
    need(len({e.id for e in entries}) == len(entries), "4.3", "two tasks of one id")
    return entries


def section_bytes(data, section):
    """The bytes of a section, with its CRC checked, and its hash where there is one."""
    raw = data[section.offset : section.offset + section.length]
    need(crc32c(raw) == section.crc, "4.1", "the CRC of a section")
    need(section.hash is None or hashlib.sha256(raw).digest() == section.hash, "8", "the hash of a section")
    return raw


def read_bases(raw, modules):
    """Section 4.4. All sizes are held against the section before anything is decoded."""
    end, plan = 0, []
    for module in modules:
        for side in (*module.A, *module.B):
            rows = side.K + side.mean
            plan.append((up(end, 16), side, rows))
            end = up(end, 16) + tensor_size(side.type, rows, side.width)
        if module.has_fingerprint:
            plan.append((up(end, 16), module, 1))
            end = up(end, 16) + 256
    need(end == len(raw), "4.4", "the tensors do not fill the bases")
    end = 0
    for start, what, rows in plan:
        need(not any(raw[end:start]), "4.4", "padding in the bases is not zero")
        if isinstance(what, Module):
            end = start + 256
            what.fingerprint = np.frombuffer(raw[start:end], "<f4")
            need(np.isfinite(what.fingerprint).all(), "4.4", "a fingerprint that is not finite")
        else:
            end = start + tensor_size(what.type, rows, what.width)
            tensor = read_tensor(raw[start:end], what.type, rows, what.width, MOST)
            what.E, what.M = tensor[: what.K], tensor[what.K] if what.mean else None


def open_pack(data, integrity=None, keys=None, revoked=()):
    """Window, directory and bases. With a root or keys nothing is decoded before they are satisfied."""
    basis_id, superblock = read_window(data)
    offset, length = superblock.directory
    # Implied: such a directory has no place among the sections. It keeps a reader from reading there.
    need(offset >= WINDOW and offset % 64 == 0 and offset + length <= superblock.committed, "2", "the directory lies where none can")
    raw = data[offset : offset + length]
    need(crc32c(raw) == superblock.directory_crc, "2", "the CRC of the directory")
    root = hashlib.sha256(data[:48] + raw).digest()
    need(integrity is None or root == hash_of(integrity), "8", "another root")
    check_signature(superblock.signature, keys, b"eigenlora pack\n" + root)

    coded_directory = u32(raw, 0) == CODE
    raw = decoded(raw, coded_directory)
    n, d, t, h = (u32(raw, at) for at in (0, 4, 8, 12))
    # Implied for all files of a usual size, whose directory has no such parts.
    need(n <= 1_048_576 and d <= 67_108_864 and t <= 268_435_456, "4", "a part of the directory is too large")
    need(h in (0, 32 * n), "4", "another number of hashes than of sections")
    need(len(raw) == 16 + 32 * n + d + t + h, "4", "the parts do not add up to the directory")
    need(h or (integrity is None and keys is None), "8", "no hashes, though a root or keys were given")
    sections = read_table(raw, n, h > 0, superblock, coded_directory)
    bases = next(s for s in sections if s.kind == BASES)
    description = raw[16 + 32 * n :][:d]
    modules = read_description(description)
    entries = read_task_list(raw[16 + 32 * n + d :][:t], [s for s in sections if s.kind == BLOB])
    bases_raw = decoded(section_bytes(data, bases), bases.coded, description)
    read_bases(bases_raw, modules)
    found = hashlib.sha256(description + bases_raw).digest()
    revoked = frozenset(map(hash_of, revoked))
    return Pack(data, basis_id, superblock, sections, modules, entries, revoked, description, found, root)


def verify(pack):
    """What a program that verifies files checks beside: basis id, signature, every padding, every section that nobody loads."""
    need(pack.found_id == pack.basis_id, "2", "the basis id is of another basis")
    if pack.superblock.signature:
        need(ed25519_verify(*pack.superblock.signature, b"eigenlora pack\n" + pack.root), "8", "a wrong signature")
    end = WINDOW
    for offset, length in sorted([pack.superblock.directory] + [(s.offset, s.length) for s in pack.sections]):
        need(not any(pack.data[end:offset]), "1", "padding between sections is not zero")
        end = offset + length
    for section in pack.sections:
        if section.kind != FREE:
            section_bytes(pack.data, section)


# ---- 5. Tensors ------------------------------------------------------------------------------------------------------


def row_size(tensor_type, width):
    return 4 * width if tensor_type == 0 else 2 * width if tensor_type < 3 else -(-INT_BITS[tensor_type] * width // 8)


def tensor_size(tensor_type, rows, width):
    scales = up(2 * rows, 4) if tensor_type in INT_BITS else 0
    return scales + up(rows * row_size(tensor_type, width), 4)


def read_tensor(raw, tensor_type, rows, width, most=math.inf):
    """The values [rows, width] in 64 bits, which hold each of them exactly. `raw` has the size of the tensor."""
    at, size = 0, row_size(tensor_type, width)
    if tensor_type in INT_BITS:
        scales = np.frombuffer(raw[: 2 * rows], "<f2").astype(np.float64)
        at = up(2 * rows, 4)
        need((np.abs(scales) * (2 ** (INT_BITS[tensor_type] - 1) - 1) < most).all(), "5", "a scale that is too large, or not finite")
        need(not any(raw[2 * rows : at]), "5", "padding behind the scales is not zero")
    body = raw[at : at + rows * size]
    need(not any(raw[at + rows * size :]), "5", "padding behind a tensor is not zero")
    if tensor_type == 0:
        values = np.frombuffer(body, "<f4")
    elif tensor_type == 1:
        values = np.frombuffer(body, "<f2")
    elif tensor_type == 2:
        values = (np.frombuffer(body, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        bits = INT_BITS[tensor_type]
        packed = np.unpackbits(np.frombuffer(body, np.uint8).reshape(rows, size), axis=1, bitorder="little")
        need(not packed[:, bits * width :].any(), "5", "bits behind a row are not zero")
        integers = packed[:, : bits * width].reshape(rows, width, bits).astype(np.int64) @ (1 << np.arange(bits))
        integers -= (integers >= 1 << bits - 1).astype(np.int64) << bits
        need((integers > -(1 << bits - 1)).all(), "5", "the least integer")
        values = scales[:, None] * integers
    values = values.astype(np.float64).reshape(rows, width)
    need((np.abs(values) < most).all(), "5", "a value that is too large, or not finite")
    return values


# ---- 6. Task blob ----------------------------------------------------------------------------------------------------

# A, B: as `read_factor` gives them; tensors: the values by name
Term = record("Term", "module rank A B q private_type magnitude_type tensors")
Parameter = record("Parameter", "name role type shape indices values")
Task = record("Task", "entry terms parameters")


# ---- Appendix A. Coded sections --------------------------------------------------------------------------------------

CODE, TASK = 0x33444F43, 0x4B534154
LEVELS = [0, 4, 8, 15, 24, 38, 56, 83, 120, 174, 248]
GIVEN_LEVELS = [0, 3, 6, 10, 16, 24, 34, 46, 62, 83, 112, 150, 205, 280, 380]
SUMS = [
    [31897, 32672, 32688, 32704, 32720, 32736, 32752],
    [29879, 32672, 32688, 32704, 32720, 32736, 32752],
    [27029, 32672, 32688, 32704, 32720, 32736, 32752],
    [23060, 32634, 32688, 32704, 32720, 32736, 32752],
    [18047, 31955, 32688, 32704, 32720, 32736, 32752],
    [13182, 29051, 32448, 32704, 32720, 32736, 32752],
    [9338, 23833, 30543, 32399, 32706, 32736, 32752],
    [6559, 18123, 26052, 30279, 32031, 32595, 32736],
    [4582, 13198, 20365, 25637, 29067, 31041, 32046],
    [3204, 9423, 15106, 19997, 23960, 26984, 29157],
    [2247, 6674, 10909, 14843, 18390, 21496, 24136],
]


class Words:
    """Four states and the tables; a table is named, and made when it is first used."""

    def __init__(self, raw):
        self.words = iter(struct.unpack(f"<{len(raw) // 2}H", raw))
        self.tables = {}
        self.x, self.others, self.given = 0, [], None
        self.x = self.first()

    def first(self):
        x = self.word() << 16 | self.word()
        need(x >= 2**16, "A", "a state that begins below 2^16")
        return x

    def swap(self, lane):
        if lane:
            self.x, self.others[lane - 1] = self.others[lane - 1], self.x

    def give(self):
        """What each of 2^11 numbers stands for by level: a symbol (None: any other), its frequency, and the first such number."""
        self.given = []
        for _ in GIVEN_LEVELS:
            numbers = []
            for a in range(16):
                if len(numbers) == 2**11:
                    break
                f = self.coded_number("frequency", 1)
                need(len(numbers) + (2 * f if a else f) <= 2**11, "A", "frequencies that are too large")
                for sign in (1, -1) if a else (1,):
                    numbers += [(sign * a, f, len(numbers))] * min(f, 2**11 - len(numbers))
            left = 2**11 - len(numbers)
            self.given.append(numbers + [(None, left, len(numbers))] * left)
        self.others = [self.first() for _ in range(3)]

    def given_symbol(self, level):
        s = self.x % 2**11
        symbol, f, first = self.given[level][s]
        self.x = f * (self.x >> 11) + s - first
        self.renew()
        return symbol

    def word(self):
        found = next(self.words, None)
        need(found is not None, "A", "a word is missing")
        return found

    def renew(self):
        if self.x < 2**16:
            self.x = self.x << 16 | self.word()

    def bits(self, c):
        value, self.x = self.x % 2**c, self.x >> c
        self.renew()
        return value

    def symbol(self, name, level=7, quick=0):
        table = self.tables.setdefault(name, [[0, *SUMS[level], 2**15], 0])
        sums, used = table
        s = self.x % 2**15
        v = max(i for i in range(8) if sums[i] <= s)
        self.x = (sums[v + 1] - sums[v]) * (self.x >> 15) + s - sums[v]
        self.renew()
        q = 4 + (used >= 4) + (used >= 12) + (used >= 40) - 2 * quick
        for i in range(1, 8):
            sums[i] += ((16 * i if i <= v else 2**15 - 16 * (8 - i)) - sums[i]) >> q
        table[1] += 1
        return v

    def coded_number(self, name, quick=0):
        c = self.symbol(name, quick=quick)
        if c == 7:
            c = min(30, 7 + self.bits(5))
        low = min(c, 16)
        high = self.bits(c - low)
        return 2**c + high * 2**low + self.bits(low) - 1

    def byte(self, last):
        high = self.symbol(f"high {last >> 5}", quick=1)
        middle = self.symbol(f"middle {high}", quick=1)
        low = self.symbol(f"low {8 * high + middle}", quick=1)
        return high << 5 | middle << 2 | low & 3

    def coded_integer(self, expected, largest):
        k = 0
        while expected >> k > 256:
            k += 1
        level = max(i for i, start in enumerate(LEVELS) if start <= expected >> k)
        a = self.symbol(11 * k + level, level)
        if a == 7:
            a = 7 + self.coded_number("more")
        magnitude = a * 2**k + self.bits(k)
        need(magnitude <= largest, "A", "an integer beyond its type")
        return -magnitude if magnitude and self.bits(1) else magnitude


def decoded(raw, coded, before=b""):
    """A section as it was before it was coded; `before` is what lies before it."""
    if not coded:
        return raw
    need(len(raw) % 2 == 0, "A", "half a word")
    need(u32(raw, 0) == CODE, "A", "another magic of a coded section")
    size = u32(raw, 4)
    need(size <= 16 * len(raw) + 4096, "A", "a coded section that grows too much")
    words, out, end = Words(raw[8:]), bytearray(size), 0
    while end < size:
        stop = end + words.coded_number("length", 1)
        need(stop <= size, "A", "more bytes than the section has")
        back = 0
        while end < stop:
            count = words.coded_number("literals", 1)
            need(end + count <= stop, "A", "more bytes than there are to come")
            for _ in range(count):
                out[end] = words.byte(out[end - 1] if end else 0)
                end += 1
            if end < stop:
                count, back = 4 + words.coded_number("length", 1), words.coded_number("distance", 1) or back
                need(end + count <= stop, "A", "a copy that is too long")
                need(back > 0, "A", "a copy from nowhere")
                need(back <= end + len(before), "A", "a copy from too far back")
                for _ in range(count):
                    out[end] = out[end - back] if back <= end else before[end - back]
                    end += 1
        if end < size:
            end = decode_run(words, out, end)
    need(all(x == 2**16 for x in (words.x, *words.others)), "A", "another last state")
    need(next(words.words, None) is None, "A", "words that are left")
    return bytes(out)


def decode_ones(words, mean, places, row, width, largest):
    """A row by tables that move, and its mean. Moves what `places` knows."""
    values = []
    for i in range(width):
        place = places.get((row, i))
        values.append(words.coded_integer(mean if place is None else (mean + place) >> 1, largest))
        seen = 64 * abs(values[-1])
        places[row, i] = (mean + seen) >> 1 if place is None else place + ((seen - place) >> 3)
        mean += (seen - mean) >> (3 if i < 7 else 4 if i < 15 else 5)
    return values, mean


def decode_fours(words, mean, places, row, width, largest):
    """A row by given frequencies, and its mean."""
    values = []
    for i in range(0, width, 4):
        k = 0
        while mean >> (4 + k) > 512:
            k += 1
        level = max(n for n, start in enumerate(GIVEN_LEVELS) if start <= mean >> (4 + k))
        symbols, sum = [], 0
        for lane in range(min(4, width - i)):
            words.swap(lane)
            symbols.append(words.given_symbol(level))
            words.swap(lane)
        for lane, symbol in enumerate(symbols):
            words.swap(lane)
            a = 16 + words.coded_number("more") if symbol is None else abs(symbol)
            magnitude = a * 2**k + words.bits(k)
            need(magnitude <= largest, "A", "an integer beyond its type")
            negative = symbol < 0 if symbol else magnitude and words.bits(1)
            values.append(-magnitude if negative else magnitude)
            sum += magnitude
            words.swap(lane)
        mean += (1024 * sum - len(symbols) * mean) >> (3 if i < 7 else 4 if i < 15 else 6)
    return values, mean


def decode_run(words, out, start):
    """Tensors of one type and shape from `start` on. Returns where they end."""
    kind = words.bits(2)
    need(kind < 3, "A", "a tensor type that is not coded")
    tensor_type, size = 3 + kind, INT_BITS[3 + kind]
    rows, width, count = (words.coded_number("shape") for _ in range(3))
    step = 16 if words.bits(1) else 4
    need(rows, "A", "a run without rows")
    need(count, "A", "a run without tensors")
    length = tensor_size(tensor_type, rows, width)
    need(start + (count - 1) * up(length, step) + length <= len(out), "A", "tensors that do not fit")
    fours = rows * width > 4096 or words.bits(1)
    if fours and words.given is None:
        words.give()
    uppers, means, places = [0] * rows, [None] * rows, {}
    for n in range(count):
        first = start + n * up(length, step)
        upper, mean = 0x3C, 1024 if fours else 64
        stride = row_size(tensor_type, width)
        at = first + up(2 * rows, 4)
        for r in range(rows):
            u = words.coded_number("scale")
            upper = ((uppers[r] or upper) + (u // 2 if u % 2 == 0 else -(u + 1) // 2)) % 256
            uppers[r] = upper
            out[first + 2 * r + 1] = upper
            out[first + 2 * r] = words.bits(8) if words.symbol("fine") else 0
            mean = mean if means[r] is None else means[r]
            values, mean = (decode_fours if fours else decode_ones)(words, mean, places, r, width, 2 ** (size - 1) - 1)
            packed = sum((value % 2**size) << (size * i) for i, value in enumerate(values))
            out[at + r * stride : at + (r + 1) * stride] = packed.to_bytes(stride, "little")
            means[r] = mean
    return first + length


def read_factor(value, bases, rank):
    """None, or the basis of the coefficients, whether its mean is added, their type (None, False, None where there are none), and the type of own rows."""
    if value is None:
        return None
    code, which, own = array(value, 3, 3, "6.1", "a factor") if isinstance(value, list) else (value, 0, None)
    own = None if own is None else integer(own, 0, 5, "6.1", "type of own rows")
    which = integer(which, 0, 0 if code is None else MAX_ITEMS - 1, "6.1", "basis of a factor")
    if code is None:
        need(own is not None, "6.1", "a factor of nothing")
        return None, False, None, own
    code = integer(code, 0, 47, "6.1", "a code of coefficients")
    need(which < len(bases), "6.1", "coefficients over a basis that is not there")
    basis = bases[which]
    need(code & 3 == basis.kind, "6.1", "coefficients of another kind than the basis")
    mean = bool(code & 4)
    need(basis.mean or not mean, "6.1", "a mean that the basis does not have")
    need(basis.kind == COLUMN or rank == basis.rank, "6.1", "another rank than the flat basis")
    return basis, mean, code >> 3, own


def read_term(value, modules):
    index, rank, A, B, q, private, magnitude = array(value, 7, 7, "6.1", "a term")
    module = modules[integer(index, 0, len(modules) - 1, "6.1", "module of a term")]
    need((A is None) == (B is None), "6.1", "a factor on one side")
    rank = integer(rank, 0 if A is None else 1, 0 if A is None else None, "6.1", "rank of a term")
    q = integer(q, 0, None, "6.1", "rank of private terms")
    need(rank + q <= min(65_535, max(256, 2 * min(module.inner, module.out))), "6.1", "r + q is too large")
    A, B = read_factor(A, module.A, rank), read_factor(B, module.B, rank)
    need(A is not None or q or magnitude is not None, "6.1", "a term that does nothing")
    private = integer(private, 0, 5 if q else 0, "6.1", "privateType")
    if magnitude is not None:
        magnitude = integer(magnitude, 0, 5, "6.1", "magnitudeType")
    return Term(module, rank, A, B, q, private, magnitude, {})


def read_parameter(value):
    items = array(value, 4, 5, "6.2", "a parameter")
    name = string(items[0], 1, 1024, "6.2", "name of a parameter")
    role = integer(items[1], 0, 3, "6.2", f"role of {name}")
    need(len(items) == (5 if role == 3 else 4), "6.2", f"{name} has a wrong number of items")
    tensor_type = integer(items[2], 0, 5, "6.2", f"type of {name}")
    least, most = {0: (1, 8), 1: (1, 1), 2: (1, 1), 3: (2, 2)}[role]
    shape = [integer(x, 1, MAX_DIM, "6.2", f"shape of {name}") for x in array(items[3], least, most, "6.2", "a shape")]
    # Implied: no file has the bytes. It keeps a reader's numbers exact.
    need(math.prod(shape) <= MAX_SAFE, "6.2", f"{name} is too large")
    indices = None
    if role == 3:
        indices = array(items[4], shape[0], shape[0], "6.2", f"indices of {name}")
        indices = [integer(x, 0, MAX_DIM, "6.2", f"indices of {name}") for x in indices]
        need(all(a < b for a, b in zip(indices, indices[1:])), "6.2", f"indices of {name} do not ascend")
    return Parameter(name, role, tensor_type, shape, indices)


def read_blob(raw, modules):
    """Terms and parameters. All sizes are held against the blob before a tensor is decoded."""
    need(len(raw) >= 8 and u32(raw, 0) == TASK, "6", "not a task blob")
    end = 8 + u32(raw, 4)
    # Implied: the tensors do not fill such a blob.
    need(end <= len(raw), "6", "a header longer than the blob")
    header_end = end
    terms, parameters = array(MessagePack.decode(raw[8:end]), 2, 2, "6", "a blob's header")
    terms = [read_term(x, modules) for x in array(terms, 0, MAX_ITEMS, "6.1", "terms")]
    index = {id(module): i for i, module in enumerate(modules)}
    order = [index[id(term.module)] for term in terms]
    need(all(a < b for a, b in zip(order, order[1:])), "6.1", "terms that are not sorted, or two of one module")
    parameters = [read_parameter(x) for x in array(parameters, 0, MAX_ITEMS, "6.2", "parameters")]
    need(len({(p.role, p.name) for p in parameters}) == len(parameters), "6.2", "a parameter that is there twice")
    saved = {p.name for p in parameters if p.role == 0}
    need(not any(p.role and p.name in saved for p in parameters), "6.2", "a parameter that is replaced and changed")
    adapted = {term.module.name + ".weight" for term in terms}
    need(not any(p.role in (0, 3) and p.name in adapted for p in parameters), "6.2", "a weight that is replaced and adapted")

    plan = []  # where the values go, their key, type, rows, width
    for term in terms:
        sides = (("A", term.A, term.module.inner), ("B", term.B, term.module.out))
        for key, factor, _ in sides:
            if factor and factor[0]:
                basis, _, tensor_type, _ = factor
                plan.append((term, f"alpha_{key}", tensor_type, term.rank if basis.kind == COLUMN else 1, basis.K))
        for key, factor, width in sides:
            if factor and factor[3] is not None:
                plan.append((term, f"own_{key}", factor[3], term.rank, width))
        if term.q:
            plan.append((term, "private_A", term.private_type, term.q, term.module.inner))
            plan.append((term, "private_B", term.private_type, term.q, term.module.out))
        if term.magnitude_type is not None:
            plan.append((term, "magnitude", term.magnitude_type, 1, term.module.out))
    for p in parameters:
        rows = p.shape[0] if len(p.shape) > 1 else 1
        plan.append((p, None, p.type, rows, math.prod(p.shape) // rows))
    for _, _, tensor_type, rows, width in plan:
        end = up(end, 4) + tensor_size(tensor_type, rows, width)
    need(end == len(raw), "6", "the tensors do not fill the blob")
    end = header_end
    for owner, key, tensor_type, rows, width in plan:
        start = up(end, 4)
        need(not any(raw[end:start]), "6", "padding in a blob is not zero")
        end = start + tensor_size(tensor_type, rows, width)
        values = read_tensor(raw[start:end], tensor_type, rows, width, MOST if key else math.inf)
        if key:
            owner.tensors[key] = values
        else:
            owner.values = values.reshape(owner.shape)
    return terms, parameters


def make_task(pack, entry, raw):
    """A task of a blob whose checksums are right."""
    need(hashlib.sha256(raw).digest() not in pack.revoked, "8", "a revoked task")
    if len(raw) >= 4 and u32(raw, 0) == CODE:
        raw = decoded(raw, True, pack.description)
        need(hashlib.sha256(raw).digest() not in pack.revoked, "8", "a revoked task, coded")
    terms, parameters = read_blob(raw, pack.modules)
    brings = {(ROLES[p.role], p.name) for p in parameters}
    brings |= {("magnitude", term.module.name) for term in terms if term.magnitude_type is not None}
    brings |= {("private", term.module.name) for term in terms if term.q}
    for role, of in (("own-A", lambda term: term.A), ("own-B", lambda term: term.B)):
        brings |= {(role, term.module.name) for term in terms if of(term) and of(term)[3] is not None}
    need(entry.brings in (None, brings), "4.3", "brings says something else than the blob brings")
    return Task(entry, terms, parameters)


def load_task(pack, i):
    return make_task(pack, pack.entries[i], section_bytes(pack.data, pack.entries[i].section))


def factors(term, absolute=False):
    """Section 6.1: A [r + q, in] and Bᵀ [r + q, out]; `absolute` puts every value's magnitude in its place."""
    value = np.abs if absolute else lambda x: x
    result = []
    for key, factor, width in (("A", term.A, term.module.inner), ("B", term.B, term.module.out)):
        rows = []
        if factor:
            basis, mean, _, own = factor
            made = np.zeros((term.rank, width))
            if basis:
                shared = value(term.tensors[f"alpha_{key}"]) @ value(basis.E)
                made = (shared + value(basis.M) if mean else shared).reshape(term.rank, width)
            rows.append(made if own is None else made + value(term.tensors[f"own_{key}"]))
        if term.q:
            rows.append(value(term.tensors[f"private_{key}"]))
        result.append(np.concatenate(rows) if rows else np.zeros((0, width)))
    return result


def delta(term):
    A, Bt = factors(term)
    return Bt.T @ A


def bound(term):
    """Section 6.3: by how much an element of ΔW may differ from the exact one."""
    A, Bt = factors(term, absolute=True)
    K = sum(factor[0].K for factor in (term.A, term.B) if factor and factor[0])
    return 2.0**-24 * (K + term.rank + term.q + 16) * (Bt.T @ A)


def place(name, base):
    """Section 6.3: the parameter of the base that a name fits; None where there is none."""
    if name in base:
        return name
    segments = name.count(".") + 1
    longer = [x for x in base if x.endswith(f".{name}") and x.count(".") + 1 - segments <= 64]
    need(len(longer) <= 1, "6.3", f"{name} fits several parameters")
    if longer:
        return longer[0]
    # A shorter name has two segments at least; the longest goes first.
    for dropped in range(1, min(64, segments - 2) + 1):
        shorter = name.split(".", dropped)[dropped]
        if shorter in base:
            return shorter
    return None


def stored_shape(module):
    if module.layout == 2:
        return [module.out, module.inner // math.prod(module.kernel), *module.kernel]
    return [module.inner, module.out] if module.layout in (1, 3) else [module.out, module.inner]


def rounded(values, dtype):
    if dtype == "BF16":
        bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        upper = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return (upper.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype({"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float64)


def apply_task(task, base):
    """
    Section 6.3: the parameters with a task. `base` gives type and values by name; new weights, and sums with role 2, are in 64 bits.
    Parameters of the other roles are rounded.
    """
    result = {name: values for name, (_, values) in base.items()}
    taken = {}  # roles by the base's name; a term is one too

    def claim(name, role):
        found = place(name, base)
        need(found is not None or role == 0, "6.3", f"the base lacks {name}")
        others = taken.setdefault(found or name, [])
        need(not others or {role, *others} == {1, 2} and len(others) == 1, "6.3", f"two items fit {found}")
        others.append(role)
        return found

    for term in task.terms:
        name = claim(f"{term.module.name}.weight", "term")
        weight = base[name][1]
        need(list(weight.shape) == stored_shape(term.module), "6.3", f"{name} is {list(weight.shape)}")
        turned = term.module.layout in (1, 3)
        matrix = weight.T if turned else weight.reshape(term.module.out, term.module.inner)
        new = matrix + delta(term)
        if term.magnitude_type is not None:
            norms = np.sqrt((new**2).sum(1))
            new = new * np.divide(term.tensors["magnitude"][0], norms, out=np.zeros_like(norms), where=norms > 0)[:, None]
        result[name] = new.T if turned else new.reshape(weight.shape)
    for p in sorted(task.parameters, key=lambda p: p.role == 2):
        name = claim(p.name, p.role)
        dtype, before = base[name] if name else ("F32", None)
        if p.role == 0:
            result[name or p.name] = rounded(p.values, dtype)
        elif p.role == 3:
            need(before.ndim == 2 and before.shape[1] == p.shape[1], "6.3", f"rows of {name} are of another width")
            need(p.indices[-1] < before.shape[0], "6.3", f"a row beyond {name}")
            result[name] = before.copy()
            result[name][p.indices] = rounded(p.values, dtype)
        else:
            need(before.shape == p.values.shape, "6.3", f"{name} is {list(before.shape)}")
            result[name] = rounded(p.values, dtype) if p.role == 1 else result[name] + p.values
    return result


# ---- 7. Task file ----------------------------------------------------------------------------------------------------


def read_task_file(data, keys=None, verifies=False, revoked=()):
    """What can be checked without the pack: the basis id, the entry and the blob."""
    need(data[:8] == TASK_MAGIC, "7", "another magic")
    need(u16(data, 8) == 1, "7", "another major version")
    need(crc32c(data[:60]) == u32(data, 60), "7", "the CRC of the head")
    entry_end = 64 + u32(data, 12)
    start = up(entry_end, 64)
    end = start + u32(data, 48)
    signed_end = up(end, 64) + 100
    need(len(data) in (end, signed_end), "7", "another length of the file")
    need(not any(data[entry_end:start]), "7", "padding behind the entry is not zero")
    need(crc32c(data[64:entry_end]) == u32(data, 52), "7", "the CRC of the entry")
    need(crc32c(data[start:end]) == u32(data, 56), "7", "the CRC of the blob")
    signature = None
    if len(data) == signed_end:
        need(not any(data[end : up(end, 64)]), "7", "padding before the signature is not zero")
        block = data[-100:]
        need(crc32c(block[:96]) == u32(block, 96), "7", "the CRC of the signature")
        signature = block[:32], block[32:96]
    message = b"eigenlora task\n" + hashlib.sha256(data[:end]).digest()
    check_signature(signature, keys, message)
    if verifies and signature:
        need(ed25519_verify(*signature, message), "8", "a wrong signature")
    raw = data[start:end]
    # Implied where the task is loaded with its pack.
    need(len(raw) >= 8 and u32(raw, 0) in (TASK, CODE), "7", "no task blob")
    # Implied where the task is loaded with its pack.
    need(hashlib.sha256(raw).digest() not in frozenset(map(hash_of, revoked)), "8", "a revoked task")
    return data[16:48], read_entry(MessagePack.decode(data[64:entry_end], 1), None), raw


def load_task_file(pack, data, keys=None, verifies=False):
    basis_id, entry, raw = read_task_file(data, keys, verifies)
    need(basis_id == pack.basis_id, "7", "a task of another basis")
    return make_task(pack, entry, raw)


# ---- 8. Hashes and signatures ----------------------------------------------------------------------------------------


def decode32(text, prefix):
    """The 32 bytes of a prefix and base64."""
    raw = base64.b64decode(text.removeprefix(prefix), validate=True)
    if prefix + base64.b64encode(raw).decode() != text or len(raw) != 32:
        raise ValueError(f"not {prefix} and the base64 of 32 bytes")
    return raw


def hash_of(text):
    return decode32(text, "sha256-")


def key_of(text):
    return decode32(text, "ed25519:")


def check_signature(signature, keys, message):
    if keys is None:
        return
    need(signature is not None, "8", "not signed, though keys were given")
    need(signature[0] in map(key_of, keys), "8", "signed by another key")
    need(ed25519_verify(*signature, message), "8", "a signature that does not fit")


P = 2**255 - 19
ORDER = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
BASE = bytes([0x58] + 31 * [0x66])


def point(raw):
    """A point in extended coordinates (RFC 8032, 5.1.3); None when there is none."""
    y = int.from_bytes(raw, "little")
    sign, y = y >> 255, y & (1 << 255) - 1
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    x = x if (x * x - square) % P == 0 else x * pow(2, (P - 1) // 4, P) % P
    if y >= P or (x * x - square) % P or (x == 0 and sign):
        return None
    x = x if x & 1 == sign else P - x
    return x, y, 1, x * y % P


def add(p, q):
    a, b = (p[1] - p[0]) * (q[1] - q[0]), (p[1] + p[0]) * (q[1] + q[0])
    c, d = 2 * p[3] * q[3] * D, 2 * p[2] * q[2]
    e, f, g, h = b - a, d - c, d + c, b + a
    return e * f % P, g * h % P, f * g % P, e * h % P


def times(n, p):
    result = (0, 1, 1, 0)
    for bit in f"{n:b}":
        result = add(result, result)
        result = add(result, p) if bit == "1" else result
    return result


def ed25519_verify(key, signature, message):
    """[S]B = R + [k]A, the equation without the cofactor."""
    a, r, s = point(key), point(signature[:32]), int.from_bytes(signature[32:], "little")
    if a is None or r is None or s >= ORDER:
        return False
    k = int.from_bytes(hashlib.sha512(signature[:32] + key + message).digest(), "little") % ORDER
    left, right = times(s, point(BASE)), add(r, times(k, a))
    return all((left[i] * right[2] - right[i] * left[2]) % P == 0 for i in (0, 1))


# ---- The test vectors ------------------------------------------------------------------------------------------------


def read_safetensors(raw):
    """Type and values in 64 bits by name."""
    n = u64(raw, 0)
    header = json.loads(raw[8 : 8 + n])
    header.pop("__metadata__", None)
    forms = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}

    def values(dtype, shape, data_offsets):
        found = np.frombuffer(raw[8 + n + data_offsets[0] : 8 + n + data_offsets[1]], forms[dtype])
        if dtype == "BF16":
            found = (found.astype(np.uint32) << 16).view(np.float32)
        return dtype, found.astype(np.float64).reshape(shape)

    return {name: values(**x) for name, x in header.items()}


def read_values(path):
    return {name: values for name, (_, values) in read_safetensors(path.read_bytes()).items()}


def read_all(folder, entry, trusted, at=[None]):
    """Everything that an entry's file holds, step by step: `at` says which it has come to."""
    data = (folder / entry["file"]).read_bytes()
    keys, revoked = (entry.get("keys"), entry.get("revoked", ())) if trusted else (None, ())
    at[0] = "open"
    if "pack" in entry:
        pack = open_pack((folder / entry["pack"]).read_bytes(), None, keys, revoked)
        read_task_file(data, keys, False, revoked)
        at[0] = "task"
        tasks = [load_task_file(pack, data, keys)]
        at[0] = "verify"
        if entry.get("step", at[0]) == at[0]:
            read_task_file(data, keys, True)
        return tasks
    pack = open_pack(data, entry.get("integrity") if trusted else None, keys, revoked)
    at[0] = "task"
    tasks = [load_task(pack, i) for i in range(len(pack.entries))]
    at[0] = "verify"
    if entry.get("step", at[0]) == at[0]:
        verify(pack)
    return tasks


def disagreements(tasks, expected):
    """What the tasks and the values of a vector say differently."""
    exact, deltas = {}, {}
    for task in tasks:
        exact |= {f"{task.entry.id}/{p.name}": p.values for p in task.parameters}
        for term in task.terms:
            name = f"{task.entry.id}/{term.module.name}"
            deltas[f"{name}/delta"], deltas[f"{name}/bound"] = delta(term), bound(term)
            if term.magnitude_type is not None:
                exact[f"{name}/magnitude"] = term.tensors["magnitude"][0]
    mine = exact | deltas
    for name in sorted(mine.keys() ^ expected.keys()):
        yield f"{name} is {'not in the values' if name in mine else 'not in the file'}"
    for name in sorted(mine.keys() & expected.keys()):
        if mine[name].shape != expected[name].shape:
            yield f"{name} is {list(mine[name].shape)}, not {list(expected[name].shape)}"
        elif name in exact and not (mine[name] == expected[name]).all():
            yield f"{name} differs"
        elif name.endswith("/delta") and name in deltas:
            if not (np.abs(mine[name] - expected[name]) <= expected[name.removesuffix("delta") + "bound"]).all():
                yield f"{name} differs by more than the bound"
        elif name in deltas and not np.allclose(mine[name], expected[name], rtol=1e-9, atol=0):
            yield f"{name}: section 6.3 gives another bound"


def check_entry(folder, entry):
    if entry["valid"]:
        if "values" not in entry:
            read_all(folder, entry, True)
            return
        expected = read_values(folder / entry["values"])
        yield from disagreements(read_all(folder, entry, True), expected)
        if "integrity" in entry or "keys" in entry:
            yield from disagreements(read_all(folder, entry, False), expected)
        return
    at = [None]
    try:
        read_all(folder, entry, True, at)
    except Refused as refused:
        if at[0] != entry["step"]:
            yield f"refused at the step {at[0]!r} ({refused}); the index says {entry['step']!r}"
        if refused.section != entry["section"]:
            yield f"refused by {refused}; the index says section {entry['section']}"
    else:
        yield f"taken, though it breaks a rule of section {entry['section']}"


def check_application(folder, entry):
    """An entry of apply.json: what the tasks make of the base, and which are refused."""
    pack = open_pack((folder / entry["pack"]).read_bytes())
    base = read_safetensors((folder / entry["base"]).read_bytes())
    expected = read_values(folder / entry["values"]) if "values" in entry else {}
    tasks = {e.id: load_task(pack, i) for i, e in enumerate(pack.entries)}
    seen = set()
    for name in entry.get("tasks", ()):
        for parameter, mine in apply_task(tasks[name], base).items():
            key = f"{name}/{parameter}"
            seen |= {key, f"{key}/bound"}
            # Where there is no bound the values are exact. 64 bits of another order of sums differ by less than any
            # bound.
            off = 1e-12 if f"{key}/bound" in expected else 0
            if key not in expected or mine.shape != expected[key].shape or not (np.abs(mine - expected[key]) <= off).all():
                yield f"{key} differs"
    yield from (f"{key} is not reached" for key in expected.keys() - seen)
    for name, why in entry.get("refused", {}).items():
        if rule_against(apply_one, folder, entry, name) is None:
            yield f"{name}: taken, though {why}"


def apply_one(folder, entry, name):
    pack = open_pack((folder / entry["pack"]).read_bytes())
    base = read_safetensors((folder / entry["base"]).read_bytes())
    apply_task(load_task(pack, [e.id for e in pack.entries].index(name)), base)


def rule_against(work, *given):
    """Which rule refuses what is read; None where none does."""
    try:
        work(*given)
    except Refused as refused:
        return refused.rule


def rules():
    """Lines of all rules: calls of `need` outside CHECKS, and calls of those. Not of those that a comment says are implied by others."""
    lines = set()
    source = Path(__file__).read_text()
    lines_of = source.splitlines()
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef) or function.name in CHECKS or function.name.startswith("read_safetensors"):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("need", *CHECKS):
                if not lines_of[node.lineno - 2].strip().startswith("# Implied"):
                    lines.add(node.lineno)
    return lines


def musts(folder):
    """Rules that no entry notices: each is switched off, and one of the entries that it refuses must then be taken, or end in a raw error."""
    global off
    refused = {}
    for entry in json.loads((folder / "index.json").read_text()):
        if not entry["valid"]:
            ask = partial(rule_against, read_all, folder, entry, True)
            refused.setdefault(ask(), []).append(ask)
    for entry in json.loads((folder / "apply.json").read_text()):
        for name in entry.get("refused", ()):
            ask = partial(rule_against, apply_one, folder, entry, name)
            refused.setdefault(ask(), []).append(ask)
    source = Path(__file__).read_text().splitlines()
    unnoticed = []
    for off in sorted(rules()):
        notices = False
        for ask in refused.get(off, ()):
            try:
                notices = ask() is None
            except Exception:  # what follows relied on the rule
                notices = True
            if notices:
                break
        if not notices:
            unnoticed.append(f"line {off}: {source[off - 1].strip()}" + (" (another rule refuses the same)" if off in refused else ""))
    off = None
    for line in unnoticed:
        print(line)
    print(f"{len(rules())} rules, {len(unnoticed)} that no vector notices")
    return 1 if unnoticed else 0


def main(folder):
    index = json.loads((folder / "index.json").read_text())
    applications = json.loads((folder / "apply.json").read_text())
    wrong = 0
    for entry in index + applications:
        try:
            found = list((check_entry if "file" in entry else check_application)(folder, entry))
        except Refused as refused:
            found = [f"refused: {refused}"]
        except Exception as error:  # a fault of this reader
            found = [f"a raw error: {error!r}"]
        wrong += bool(found)
        for line in found:
            print(f"{entry.get('file') or entry['base']} ({entry['why']}): {line if len(line) < 240 else line[:80] + ' … ' + line[-80:]}")
    valid = sum(entry["valid"] for entry in index)
    print(f"{valid} valid and {len(index) - valid} invalid files, {len(applications)} bases: {len(index) + len(applications) - wrong} agree, {wrong} do not")
    return 1 if wrong else 0


def meaning(pack, task):
    """Modules, and of each task ΔW with its bound, magnitudes and parameters; None where the modules are too large for that."""
    pack = open_pack(base64.b64decode(pack))
    if sum(module.out * module.inner for module in pack.modules) > 1e6:
        return None
    tasks = {entry.id: load_task(pack, i) for i, entry in enumerate(pack.entries)}
    if task is not None:
        tasks["mutant"] = load_task_file(pack, base64.b64decode(task))
    flat = lambda values: None if values is None else values.ravel().tolist()
    return {
        "modules": [{"name": m.name, "out": m.out, "in": m.inner, "layout": m.layout, "kernel": m.kernel} for m in pack.modules],
        "tasks": {
            name: {
                "terms": {
                    term.module.name: {"delta": flat(delta(term)), "bound": flat(bound(term)), "magnitude": flat(term.tensors.get("magnitude"))}
                    for term in found.terms
                },
                "parameters": [
                    {"name": p.name, "role": p.role, "shape": p.shape, "indices": p.indices, "values": flat(p.values)} for p in found.parameters
                ],
            }
            for name, found in tasks.items()
        },
    }


def meanings():
    for line in sys.stdin:
        given = json.loads(line)
        try:
            found = meaning(given["pack"], given.get("task"))
        except Refused as refused:
            found = {"refused": str(refused)}
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    if "--meanings" in sys.argv:
        sys.exit(meanings())
    sys.exit((musts if "--musts" in sys.argv else main)(Path(sys.argv[1])))
