"""recjax: recommendation models whose tables outgrow the accelerators."""
