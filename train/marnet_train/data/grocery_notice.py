"""This module says where the Grocery Store data set comes from, and holds its licence, which has to
travel with it.
"""

ADDRESS = "https://github.com/marcusklasson/GroceryStoreDataset"
NOTICE = f"""\
# Grocery Store data set

Written by `marnet-train data grocery` from a checkout of <{ADDRESS}>.
The image files and the splits are those of the checkout, unchanged. The text of every image is the
description of its product.

Marcus Klasson, Cheng Zhang, Hedvig Kjellström: "A Hierarchical Grocery Store Image Dataset with
Visual and Semantic Labels". IEEE Winter Conference on Applications of Computer Vision (WACV), 2019.

## Licence

MIT License

Copyright (c) 2019 Marcus Klasson

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""
