"""Reads, checks and tokenises instruction data, prompts and plain text, and collates them into batches."""

from lit_distill.data.corpus import Corpus, PackedText
from lit_distill.data.instructions import InstructionData
from lit_distill.data.length_limits import LengthLimits
from lit_distill.data.loader import BatchDataset, ResumableLoader
from lit_distill.data.records import Records
from lit_distill.data.sampler import BatchIndices, CorpusOrder, GlobalBatchSampler
from lit_distill.data.synthetic.data import GeneratedCorpus, ProceduralData
from lit_distill.data.templates import Template

__all__ = [
    "BatchDataset",
    "BatchIndices",
    "Corpus",
    "CorpusOrder",
    "GeneratedCorpus",
    "GlobalBatchSampler",
    "InstructionData",
    "LengthLimits",
    "PackedText",
    "ProceduralData",
    "Records",
    "ResumableLoader",
    "Template",
]
