"""Instruction data, prompts and plain text: read, checked, tokenised once and put into batches."""

from lit_distill.data.corpus import Corpus, PackedText
from lit_distill.data.instructions import InstructionData
from lit_distill.data.loading import BatchDataset, ResumableLoader
from lit_distill.data.overlong import Limits
from lit_distill.data.procedural_data import GeneratedCorpus, ProceduralData
from lit_distill.data.records import Records
from lit_distill.data.sampling import BatchIndices, CorpusOrder, GlobalBatchSampler
from lit_distill.data.templates import Template

__all__ = [
    "BatchDataset",
    "BatchIndices",
    "Corpus",
    "CorpusOrder",
    "GeneratedCorpus",
    "GlobalBatchSampler",
    "InstructionData",
    "Limits",
    "PackedText",
    "ProceduralData",
    "Records",
    "ResumableLoader",
    "Template",
]
