"""Imported once by the server from which every training is forked."""

import axolotl.cli.config
import axolotl.cli.train
import axolotl.core.builders  # noqa: F401

import dwakd_plugin.evaluate.held_out
import dwakd_plugin.plugin
import dwakd_plugin.train.assembly
import dwakd_plugin.train.trainer  # noqa: F401
