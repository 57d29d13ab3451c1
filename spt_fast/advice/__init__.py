"""How much domain data to pretrain with, by a table of runs or by the papers alone: `advise.advise`."""
