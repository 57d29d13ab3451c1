"""From a table of runs, or from the papers alone, to how much domain data to pretrain with: `advise.advise`."""
