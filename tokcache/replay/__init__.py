"""`tokcache replay`: the hits that the caches would have on recorded requests.

`traces` reads the recordings, `curves` counts hits for all cache sizes in one pass, `report` makes
the page that people look at.
"""
