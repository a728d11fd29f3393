//! The arrays of a matrix in the portable layout, by name: what is stored, checked, sliced, pickled and restored.
use super::{Format, ScaleType, ValueMap, ZeroKind};
use crate::error::Result;
use crate::qtensor::area;

/// Every name that some part has.
pub const PART_NAMES: [&str; 7] = ["codes", "scales", "zeros", "tensor_scale", "row_scales", "mask", "table"];

/// Which part of an array a part of the matrix takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Along {
    /// Rows, and the bytes of packed codes.
    Codes,
    /// Rows and groups.
    Groups,
    /// Rows.
    Rows,
    /// All of it.
    Whole,
    /// What is kept of it: of one dimension, and as long as the mask says, at most as its shape says.
    Kept,
}

impl Along {
    /// Name in Python.
    pub fn name(self) -> &'static str {
        match self {
            Self::Codes => "codes",
            Self::Groups => "groups",
            Self::Rows => "rows",
            Self::Whole => "whole",
            Self::Kept => "kept",
        }
    }
}

/// One array of the portable layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Its name: an attribute of the matrix, and the last word of the name of a stored tensor.
    pub name: &'static str,
    /// The types it may have, the usual one first.
    pub types: &'static [&'static str],
    /// Its shape.
    pub shape: Vec<usize>,
    /// How it is sliced.
    pub along: Along,
}

impl Format {
    /// Whether a float32 of the whole tensor multiplies every scale: small scales reach no further than 448.
    pub fn has_tensor_scale(&self) -> bool {
        self.scale == ScaleType::E4M3
    }

    /// The array of the numbers that multiply scales, if there is one.
    pub fn outer_name(&self) -> Option<&'static str> {
        if self.is_two_level() {
            Some("row_scales")
        } else if self.has_tensor_scale() {
            Some("tensor_scale")
        } else {
            None
        }
    }

    /// Numbers that multiply the scales of a matrix: one of each row, one of the tensor, or none.
    pub fn outer_len(&self, rows: usize) -> usize {
        if self.is_two_level() {
            rows
        } else {
            usize::from(self.has_tensor_scale())
        }
    }

    /// The arrays of a matrix of that shape, codes and scales first.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for a shape beyond what memory can address.
    pub fn parts(&self, rows: usize, cols: usize) -> Result<Vec<Part>> {
        area(rows, cols)?;
        let groups = vec![rows, self.groups(cols)];
        let scales: &[&str] = match self.scale {
            ScaleType::F32 => &["f32"],
            ScaleType::F16 => &["f16"],
            ScaleType::BF16 => &["bf16"],
            ScaleType::E8M0 | ScaleType::E4M3 | ScaleType::I8 => &["u8"],
        };
        let row_bytes = self.row_bytes(cols);
        let (codes, along) = match self.structure {
            None => (vec![rows, row_bytes], Along::Codes),
            Some(_) => (vec![rows * row_bytes], Along::Kept),
        };
        let mut parts = vec![
            Part { name: "codes", types: &["u8"], shape: codes, along },
            Part { name: "scales", types: scales, shape: groups.clone(), along: Along::Groups },
        ];
        if self.element.zero == ZeroKind::PerGroup {
            parts.push(Part { name: "zeros", types: &["u8", "f32"], shape: groups, along: Along::Groups });
        }
        if let Some(name) = self.outer_name() {
            let along = if self.is_two_level() { Along::Rows } else { Along::Whole };
            parts.push(Part { name, types: &["f32"], shape: vec![self.outer_len(rows)], along });
        }
        if let Some(s) = self.structure {
            let (unit_rows, bytes) = s.mask_shape(rows, cols);
            parts.push(Part { name: "mask", types: &["u8"], shape: vec![unit_rows, bytes], along: Along::Whole });
        }
        if self.element.learned() > 0 {
            let count = self.element.learned();
            let (shape, along) = match self.element.map {
                ValueMap::Vectors(shape) => (vec![shape.entries(), shape.len], Along::Whole),
                ValueMap::RowLearned => (vec![rows, count], Along::Rows),
                _ => (vec![count], Along::Whole),
            };
            parts.push(Part { name: "table", types: &["f32"], shape, along });
        }
        Ok(parts)
    }
}
