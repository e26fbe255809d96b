"""`cotfaith validate`: do the scores say what is true of models whose truth is known?"""
