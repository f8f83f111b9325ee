"""Checkpoints: complete or absent, with weights and optimizer state in one form for every parallel layout."""

from looplm.checkpoint.about import CHANGEABLE as CHANGEABLE
from looplm.checkpoint.about import FORMAT_VERSION as FORMAT_VERSION
from looplm.checkpoint.about import WEIGHTS_ONLY as WEIGHTS_ONLY
from looplm.checkpoint.about import About as About
from looplm.checkpoint.about import Health as Health
from looplm.checkpoint.about import ModelDescription as ModelDescription
from looplm.checkpoint.about import check_fit as check_fit
from looplm.checkpoint.about import find_difference as find_difference
from looplm.checkpoint.about import git_revision as git_revision
from looplm.checkpoint.about import read_about as read_about
from looplm.checkpoint.about import read_config as read_config
from looplm.checkpoint.about import read_model as read_model
from looplm.checkpoint.about import versions as versions
from looplm.checkpoint.disk import number_at_once as number_at_once
from looplm.checkpoint.disk import prepare as prepare
from looplm.checkpoint.saver import Saver as Saver
from looplm.checkpoint.saving import COMPANION_FOLDER as COMPANION_FOLDER
from looplm.checkpoint.state import OpenedModel as OpenedModel
from looplm.checkpoint.state import TrainingState as TrainingState
from looplm.checkpoint.state import load_optimizer as load_optimizer
from looplm.checkpoint.state import load_run as load_run
from looplm.checkpoint.state import load_weights as load_weights
from looplm.checkpoint.state import open_model as open_model
from looplm.checkpoint.state import open_step as open_step
from looplm.checkpoint.state import resume as resume
from looplm.checkpoint.state import save_weights as save_weights
