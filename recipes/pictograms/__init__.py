"""Icons with names, from the npm package @iconify/json, and the pre-training of `pictogram-tiny` on them.

python -m recipes.pictograms            download the package, draw the icons and write the table
python -m recipes.pictograms.pretrain   pre-train the model on them
"""
