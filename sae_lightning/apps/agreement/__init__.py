"""Do the scores agree with the judgements of people?"""
