"""The promise, checked on the user's own model and data.

`samples` picks a few real samples, `reference` computes their gradient the plain way in float64, `classes` and `ranks`
compute it in every way that training may, `checks` looks at what is no gradient (who is supervised, who comes when),
`report` compares. Each class of ways ends in one `Result`.
"""
