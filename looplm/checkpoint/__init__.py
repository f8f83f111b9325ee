"""Checkpoints: complete or absent, with weights and optimizer state in one form for every parallel layout.

step_folder.py      the folders: a step is there whole, or not at all
verify.py           a step's files against its manifest, before any is trusted
about.py            what a step says of itself, and whether a run may start from it
state.py            save and load: a run's whole state, or weights alone
saver.py            the checkpoints of a run: when, how many, which to keep
saving.py           one of them, written by all ranks beside training
plan.py, job.py     one rank's part: which tensors to which files, written, flushed, hashed
writer.py           the process that does it; memory.py what it shares with its rank
optimizer_state.py  Adam's moments, whatever optimizer and layout hold them
contents.py         names and shapes, without reading a tensor
disk.py             is there room, before the run; host_memory.py the main memory that saving and loading take
new_folder.py       the folders of other commands: by one process, never over what is there
"""

from looplm.checkpoint.about import CHANGEABLE as CHANGEABLE
from looplm.checkpoint.about import FORMAT_VERSION as FORMAT_VERSION
from looplm.checkpoint.about import WEIGHTS_ONLY as WEIGHTS_ONLY
from looplm.checkpoint.about import About as About
from looplm.checkpoint.about import Health as Health
from looplm.checkpoint.about import ModelDescription as ModelDescription
from looplm.checkpoint.about import check_fit as check_fit
from looplm.checkpoint.about import check_moments as check_moments
from looplm.checkpoint.about import check_resume as check_resume
from looplm.checkpoint.about import find_difference as find_difference
from looplm.checkpoint.about import git_revision as git_revision
from looplm.checkpoint.about import read_about as read_about
from looplm.checkpoint.about import read_config as read_config
from looplm.checkpoint.about import read_model as read_model
from looplm.checkpoint.about import versions as versions
from looplm.checkpoint.disk import number_at_once as number_at_once
from looplm.checkpoint.disk import prepare as prepare
from looplm.checkpoint.host_memory import HostMemory as HostMemory
from looplm.checkpoint.host_memory import host_bytes as host_bytes
from looplm.checkpoint.saver import Saver as Saver
from looplm.checkpoint.saving import COMPANION_FOLDER as COMPANION_FOLDER
from looplm.checkpoint.state import OpenedModel as OpenedModel
from looplm.checkpoint.state import TrainingState as TrainingState
from looplm.checkpoint.state import check_tokens as check_tokens
from looplm.checkpoint.state import load_optimizer as load_optimizer
from looplm.checkpoint.state import load_run as load_run
from looplm.checkpoint.state import load_weights as load_weights
from looplm.checkpoint.state import open_model as open_model
from looplm.checkpoint.state import open_step as open_step
from looplm.checkpoint.state import resume as resume
from looplm.checkpoint.state import save_weights as save_weights
