//! Products on tiles (AMX): those of [`super::brain`] at sixteen times the rate of f32, and exact ones of
//! bytes at twice that.
//!
//! A tile register holds 16 rows of 64 bytes. [`micro`] multiplies a tile of rows, 32 coordinates of each,
//! with a tile of columns as [`super::brain::Packed`] lays them out, pair of coordinates by pair.
//! `tdpbf16ps` adds the even and the odd coordinates in a chain each, to nearest, and takes subnormal numbers
//! as zero: within the bounds of [`super::screen`].

use core::arch::asm;

use super::brain::{Kernels, STRIDE};

/// Rows of a tile.
pub(super) const TILE: usize = 16;
/// Columns of a tile; words of two coordinates in a row of it.
pub(super) const LANES: usize = 16;
/// Rows of a register block: two tiles.
pub(super) const ROWS: usize = 2 * TILE;

pub(super) static KERNELS: Kernels = Kernels {
    rows: ROWS,
    pairs: LANES,
    micro: [micro::<1>, micro::<2>],
};

/// True if the processor has such tiles and the system lets this process use them.
pub(super) fn is_available() -> bool {
    // The CPUID bits of amx-bf16, amx-tile and amx-int8.
    const BITS: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    // A leaf beyond the last is answered with another's bits; AVX-512, which comes first, has leaf 7.
    super::isa::Isa::Avx512Bf16.is_available()
        && super::isa::cpuid(7).edx & BITS == BITS
        && is_permitted()
}

/// Asks the system for the memory that it saves tiles in: for the process and those that it forks.
#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const REQUEST_PERMISSION: u64 = 0x1023;
    const TILE_DATA: u64 = 18;
    let status: i64;
    // SAFETY: the call changes what the system allows this process, and no memory of it.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => status,
            in("rdi") REQUEST_PERMISSION,
            in("rsi") TILE_DATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    status == 0
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// While it lives, the tiles of this thread have their full size.
pub(super) struct Tiles(());

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    let mut tile = 0;
    while tile < 8 {
        (row_bytes[tile], rows[tile]) = (4 * LANES as u16, TILE as u8);
        tile += 1;
    }
    Config {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes,
        rows,
    }
};

impl Tiles {
    /// Takes them. `Isa::Amx` must be available.
    pub fn new() -> Self {
        assert!(super::active_isa() == super::Isa::Amx);
        // SAFETY: the processor has tiles, and 64 bytes are read.
        unsafe { asm!("ldtilecfg [{0}]", in(reg) &CONFIG, options(nostack, readonly)) };
        Tiles(())
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: whoever made this value found tiles.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// As [`super::micro::Micro`], in words of two coordinates, [`LANES`] of them at once; [`Tiles`] are taken.
unsafe fn micro<const VECTORS: usize>(
    points: *const u32,
    panel: *const u32,
    depth: usize,
    tile: *mut f32,
    stride: usize,
    overwrite: bool,
) {
    let mut block = core::mem::MaybeUninit::<[f32; ROWS * 2 * LANES]>::uninit();
    // The sums start from zero, so that a chain is no longer than a block of coordinates.
    let (sums, line) = if overwrite {
        (tile, stride)
    } else {
        (block.as_mut_ptr().cast::<f32>(), VECTORS * LANES)
    };
    // SAFETY: within the bounds that the caller keeps: `depth`, not 0, is a multiple of LANES; a step reads
    // LANES words of ROWS points and LANES lines of the panel; ROWS lines of VECTORS * LANES sums are
    // written. No compiled code uses tile registers.
    unsafe {
        let second = points.add(TILE * STRIDE);
        let below = sums.add(TILE * line);
        if VECTORS == 2 {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{first} + {points}*1]",
                "tileloadd tmm6, [{panel} + {width}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{panel} + {width}*1 + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{second} + {points}*1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {first}, 64",
                "add {second}, 64",
                "add {panel}, 2048",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{sums} + {line}*1], tmm0",
                "tilestored [{sums} + {line}*1 + 64], tmm1",
                "tilestored [{below} + {line}*1], tmm2",
                "tilestored [{below} + {line}*1 + 64], tmm3",
                first = inout(reg) points => _,
                second = inout(reg) second => _,
                panel = inout(reg) panel => _,
                steps = inout(reg) depth / LANES => _,
                points = in(reg) STRIDE * 4,
                width = in(reg) 2 * LANES * 4,
                sums = in(reg) sums,
                below = in(reg) below,
                line = in(reg) line * 4,
                options(nostack),
            );
        } else {
            asm!(
                "tilezero tmm0",
                "tilezero tmm2",
                "2:",
                "tileloadd tmm4, [{first} + {points}*1]",
                "tileloadd tmm6, [{panel} + {width}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm5, [{second} + {points}*1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "add {first}, 64",
                "add {second}, 64",
                "add {panel}, 1024",
                "dec {steps}",
                "jnz 2b",
                "tilestored [{sums} + {line}*1], tmm0",
                "tilestored [{below} + {line}*1], tmm2",
                first = inout(reg) points => _,
                second = inout(reg) second => _,
                panel = inout(reg) panel => _,
                steps = inout(reg) depth / LANES => _,
                points = in(reg) STRIDE * 4,
                width = in(reg) LANES * 4,
                sums = in(reg) sums,
                below = in(reg) below,
                line = in(reg) line * 4,
                options(nostack),
            );
        }
        if !overwrite {
            if VECTORS == 2 {
                add::<{ 2 * LANES }>(sums, tile, stride);
            } else {
                add::<LANES>(sums, tile, stride);
            }
        }
    }
}

/// Sums of products of digits as [`super::split`] lays them out, of [`ROWS`] rows with [`LANES`] columns: for each
/// of two groups of rows and for each of three levels, a tile of `sums`.
///
/// # Safety
/// `rows` holds two groups of `depth` > 0 steps, `apart` words apart, `columns` one; `sums` six tiles;
/// [`Tiles`] are taken.
pub(super) unsafe fn digit_sums(
    rows: *const u32,
    apart: usize,
    columns: *const u32,
    depth: usize,
    sums: *mut i32,
) {
    // SAFETY: within the bounds that the caller keeps: a step is three tiles of each group and of the columns, the
    // high digits first. No compiled code uses tile registers.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "tilezero tmm4",
            "tilezero tmm5",
            "2:",
            // With the columns' high digits, each digit of the rows has a level of its own.
            "tileloadd tmm7, [{columns} + {line}*1]",
            "tileloadd tmm6, [{first} + {line}*1]",
            "tdpbssd tmm0, tmm6, tmm7",
            "tileloadd tmm6, [{second} + {line}*1]",
            "tdpbssd tmm3, tmm6, tmm7",
            "tileloadd tmm6, [{first} + {line}*1 + 1024]",
            "tdpbssd tmm1, tmm6, tmm7",
            "tileloadd tmm6, [{second} + {line}*1 + 1024]",
            "tdpbssd tmm4, tmm6, tmm7",
            "tileloadd tmm6, [{first} + {line}*1 + 2048]",
            "tdpbssd tmm2, tmm6, tmm7",
            "tileloadd tmm6, [{second} + {line}*1 + 2048]",
            "tdpbssd tmm5, tmm6, tmm7",
            // With the middle ones, one level further down.
            "tileloadd tmm7, [{columns} + {line}*1 + 1024]",
            "tileloadd tmm6, [{first} + {line}*1]",
            "tdpbssd tmm1, tmm6, tmm7",
            "tileloadd tmm6, [{second} + {line}*1]",
            "tdpbssd tmm4, tmm6, tmm7",
            "tileloadd tmm6, [{first} + {line}*1 + 1024]",
            "tdpbssd tmm2, tmm6, tmm7",
            "tileloadd tmm6, [{second} + {line}*1 + 1024]",
            "tdpbssd tmm5, tmm6, tmm7",
            // With the low ones, two.
            "tileloadd tmm7, [{columns} + {line}*1 + 2048]",
            "tileloadd tmm6, [{first} + {line}*1]",
            "tdpbssd tmm2, tmm6, tmm7",
            "tileloadd tmm6, [{second} + {line}*1]",
            "tdpbssd tmm5, tmm6, tmm7",
            "add {first}, 3072",
            "add {second}, 3072",
            "add {columns}, 3072",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {line}*1], tmm0",
            "tilestored [{sums} + {line}*1 + 1024], tmm1",
            "tilestored [{sums} + {line}*1 + 2048], tmm2",
            "tilestored [{sums} + {line}*1 + 3072], tmm3",
            "tilestored [{sums} + {line}*1 + 4096], tmm4",
            "tilestored [{sums} + {line}*1 + 5120], tmm5",
            first = inout(reg) rows => _,
            second = inout(reg) rows.add(apart) => _,
            columns = inout(reg) columns => _,
            steps = inout(reg) depth => _,
            line = in(reg) 4 * LANES,
            sums = in(reg) sums,
            options(nostack),
        );
    }
}

/// Adds a block of sums to a tile.
unsafe fn add<const WIDTH: usize>(sums: *const f32, tile: *mut f32, stride: usize) {
    // SAFETY: both hold ROWS rows of WIDTH values.
    unsafe {
        for i in 0..ROWS {
            for c in 0..WIDTH {
                *tile.add(i * stride + c) += *sums.add(i * WIDTH + c);
            }
        }
    }
}
