def write(results,out):
    import json
    (out/"results.json").write_text(json.dumps(results,indent=1))
    (out/"table.md").write_text("")
