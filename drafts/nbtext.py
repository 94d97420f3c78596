"""dump NB > text ; build TEXT NB : text form '%%%% code|md|raw [id] {json meta}'"""
import sys, re, json, nbformat
from pathlib import Path
def dump(p, outputs=False):
    nb = nbformat.read(p, 4)
    o = []
    for c in nb.cells:
        k = {"code":"code","markdown":"md","raw":"raw"}[c.cell_type]
        m = {k:v for k,v in c.metadata.items() if k != "nbgrader"}
        o.append(f"%%%% {k} {c.id} {json.dumps(m)}\n{c.source}\n")
        if outputs and c.cell_type == "code":
            for x in c.outputs:
                t = x.get("text") or x.get("data",{}).get("text/plain") or "\n".join(x.get("traceback",[]))[-300:]
                o.append("   >>> " + t.rstrip().replace("\n","\n   >>> ") + "\n")
    return "\n".join(o)
def build(t, p):
    p = Path(p); old = {}
    meta = {}
    if p.exists():
        nb0 = nbformat.read(p, 4); meta = nb0.metadata
        old = {c.id: c for c in nb0.cells}
    else:
        meta = nbformat.read("nbs/05_embeddings.ipynb",4).metadata
    nb = nbformat.v4.new_notebook(metadata=meta); nb.nbformat_minor = 5
    text = Path(t).read_text()
    parts = re.split(r"^%%%% (code|md|raw)([^\n{]*)(\{[^\n]*\})?[ ]*\n", text, flags=re.M)
    assert parts[0].strip()=="", parts[0][:100]
    out=[]
    import hashlib
    seen=set()
    for i in range(1, len(parts), 4):
        k, cid, m, src = parts[i:i+4]
        src = src.strip("\n"); cid = cid.strip(); m = json.loads(m) if m else {}
        if not cid:
            cid = hashlib.sha1((k+src).encode()).hexdigest()[:8]
            while cid in seen: cid = hashlib.sha1((cid).encode()).hexdigest()[:8]
        assert cid not in seen, cid
        seen.add(cid)
        c = {"code":nbformat.v4.new_code_cell,"md":nbformat.v4.new_markdown_cell,"raw":nbformat.v4.new_raw_cell}[k](src)
        c.id = cid; c.metadata.update(m)
        if k=="code" and cid in old and old[cid].cell_type=="code":
            c.outputs = old[cid].outputs
            c.execution_count = old[cid].execution_count
        nb.cells.append(c)
        out.append(f"%%%% {k} {cid} {json.dumps(m)}\n{src}\n")
    nbformat.write(nb, p)
    Path(t).write_text("\n".join(out))
if __name__=="__main__":
    if sys.argv[1]=="dump": print(dump(sys.argv[2], "-o" in sys.argv))
    else: build(sys.argv[2], sys.argv[3])
