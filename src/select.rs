//! Which rows of a module carry the probe's direction.

use crate::error::{Error, Result};

/// Rows whose coefficient stands more than `z` population standard deviations above the mean of
/// `coef`, ascending; with `positive`, only those whose coefficient is positive as well.
///
/// Coefficients that are all equal select nothing.
///
/// ```
/// let mut coef = vec![0.0; 20];
/// coef[7] = 1.0;
/// assert_eq!(nest_rs::select_rows(&coef, 3.0, true)?, [7]);
/// # Ok::<(), nest_rs::Error>(())
/// ```
///
/// # Errors
/// A non-finite coefficient, or a `z` that is not a number.
pub fn select_rows(coef: &[f64], z: f64, positive: bool) -> Result<Vec<i32>> {
    if z.is_nan() {
        return Err(Error::argument("z", z, "must be a number"));
    }
    if coef.len() > i32::MAX as usize {
        return Err(Error::shape("coef", coef.len(), "fewer than 2^31 rows"));
    }
    if let Some(row) = coef.iter().position(|w| !w.is_finite()) {
        return Err(Error::NonFinite {
            what: "coef".to_string(),
            row,
            col: 0,
            value: coef[row] as f32,
        });
    }
    let n = coef.len() as f64;
    let mean = coef.iter().sum::<f64>() / n;
    let variance = coef.iter().map(|w| (w - mean) * (w - mean)).sum::<f64>() / n;
    let deviation = variance.sqrt();
    // Equal coefficients leave a variance of rounding errors.
    let constant = coef.iter().all(|w| w == &coef[0]);
    if constant || deviation == 0.0 {
        return Ok(Vec::new());
    }
    Ok((0..coef.len())
        .filter(|&i| (coef[i] - mean) / deviation > z && (!positive || coef[i] > 0.0))
        .map(|i| i as i32)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_coefficients_select_nothing() {
        assert!(select_rows(&[0.1; 9], 0.0, false).unwrap().is_empty());
        assert!(select_rows(&[], 3.0, true).unwrap().is_empty());
    }

    #[test]
    fn the_sign_counts_if_asked() {
        let mut coef = vec![-1.0; 50];
        coef[3] = -0.5;
        assert_eq!(select_rows(&coef, 3.0, false).unwrap(), [3]);
        assert!(select_rows(&coef, 3.0, true).unwrap().is_empty());
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(select_rows(&[f64::NAN, 1.0], 3.0, true).is_err());
        assert!(select_rows(&[0.0, 1.0], f64::NAN, true).is_err());
    }
}
