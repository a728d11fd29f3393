//! Element types of the container.
use std::fmt;

macro_rules! dtypes {
    ($($(#[$doc:meta])* $variant:ident $name:literal $bits:literal,)*) => {
        /// Element type of a stored tensor.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Dtype {
            $($(#[$doc])* $variant,)*
        }

        impl Dtype {
            /// Every type.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The name in the header.
            pub fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }

            /// Bits of one element.
            pub fn bits(self) -> u32 {
                match self {
                    $(Self::$variant => $bits,)*
                }
            }
        }
    };
}

dtypes! {
    /// A byte, 0 or 1.
    Bool "BOOL" 8,
    /// E2M1 of the OCP microscaling formats, two in a byte.
    F4 "F4" 4,
    /// E2M3, four in three bytes.
    F6E2M3 "F6_E2M3" 6,
    /// E3M2, four in three bytes.
    F6E3M2 "F6_E3M2" 6,
    /// Unsigned byte.
    U8 "U8" 8,
    /// Signed byte.
    I8 "I8" 8,
    /// E5M2.
    F8E5M2 "F8_E5M2" 8,
    /// E4M3 without infinities.
    F8E4M3 "F8_E4M3" 8,
    /// A power of two: the scale of the microscaling formats.
    F8E8M0 "F8_E8M0" 8,
    /// E4M3 without infinities and negative zero.
    F8E4M3Fnuz "F8_E4M3FNUZ" 8,
    /// E5M2 without infinities and negative zero.
    F8E5M2Fnuz "F8_E5M2FNUZ" 8,
    /// Signed, 16 bits.
    I16 "I16" 16,
    /// Unsigned, 16 bits.
    U16 "U16" 16,
    /// IEEE binary16.
    F16 "F16" 16,
    /// bfloat16.
    BF16 "BF16" 16,
    /// Signed, 32 bits.
    I32 "I32" 32,
    /// Unsigned, 32 bits.
    U32 "U32" 32,
    /// IEEE binary32.
    F32 "F32" 32,
    /// Two binary32.
    C64 "C64" 64,
    /// IEEE binary64.
    F64 "F64" 64,
    /// Signed, 64 bits.
    I64 "I64" 64,
    /// Unsigned, 64 bits.
    U64 "U64" 64,
}

impl Dtype {
    /// The type with this name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|d| d.name() == name)
    }

    /// Bytes that the data of this type are aligned to by the writer.
    pub(super) fn alignment(self) -> u32 {
        self.bits().div_ceil(8).next_power_of_two()
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        for &d in Dtype::ALL {
            assert_eq!(Dtype::parse(d.name()), Some(d));
        }
        assert_eq!(Dtype::parse("f32"), None);
        assert_eq!(Dtype::parse(""), None);
    }
}
