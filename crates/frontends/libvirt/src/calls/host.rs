//! Memory of the host.

use super::{
    Answered,
    devices::{parameters, typed},
    nothing,
};
use crate::{
    error::VirError,
    session::{Answer, Call},
    xdr::{Typed, Writer},
    xml::machine::refuse,
};
use karst_engine::health::resources::MemoryResources;

/// Sizes and cells of one question (`REMOTE_NODE_MAX_CELLS`), parameters of another (`REMOTE_NODE_MEMORY_PARAMETERS_MAX`).
const MOST: usize = 1024;
const PARAMETERS: usize = 64;

async fn whole(call: &Call) -> Result<MemoryResources, VirError> {
    Ok(call.session.front.engine.host_resources(&call.session.context).await?.memory)
}

/// Total and free, bytes.
async fn memory(call: &Call) -> Result<(u64, u64), VirError> {
    let memory = whole(call).await?;
    Ok((memory.total, memory.total.saturating_sub(memory.used)))
}

/// `NODE_GET_FREE_MEMORY`
pub async fn free_memory(call: Call) -> Answered {
    call.arguments(|_| Ok(()))?;
    let mut w = Writer::new();
    w.u64(memory(&call).await?.1);
    Ok(w.finish().into())
}

/// `NODE_GET_CELLS_FREE_MEMORY`: the host is shown as one cell.
pub async fn free_cells(call: Call) -> Answered {
    let (start, count) = call.arguments(|r| Ok((r.i32()?, r.i32()?)))?;
    if start != 0 {
        return Err(VirError::argument(format!("start cell {start} out of range (0-0)")));
    }
    let free = memory(&call).await?.1;
    let mut w = Writer::new();
    w.array([free].into_iter().take(usize::from(count > 0)).collect::<Vec<_>>(), |w, free| {
        w.u64(free);
    });
    Ok(w.finish().into())
}

/// `NODE_GET_MEMORY_STATS`, KiB: of all cells (-1) or the only one.
pub async fn memory_stats(call: Call) -> Answered {
    let (wanted, cell, flags) = call.arguments(|r| Ok((r.i32()?, r.i32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    if cell > 0 {
        return Err(VirError::argument("cellNum must be less than or equal to 0"));
    }
    let memory = whole(&call).await?;
    let all = [
        ("total", memory.total),
        ("free", memory.free),
        ("buffers", memory.buffers),
        ("cached", memory.cached),
    ]
    .map(|(name, bytes)| (name, bytes / 1024));
    Ok(figures(&all, wanted))
}

/// Sizes of the host's pages, KiB.
pub(super) async fn page_sizes(call: &Call) -> Result<Vec<u64>, VirError> {
    let memory = whole(call).await?;
    let all = std::iter::once(memory.page_size).chain(memory.huge_pages.iter().map(|(size, ..)| *size));
    Ok(all.filter(|size| *size > 0).map(|size| size / 1024).collect())
}

/// How many pages of a size are free.
fn free_of(memory: &MemoryResources, kib: u32) -> Result<u64, VirError> {
    let size = u64::from(kib) << 10;
    let huge = memory.huge_pages.iter().find(|(of, ..)| *of == size).map(|(_, _, free)| *free);
    let plain = || memory.free.checked_div(size).filter(|_| size == memory.page_size);
    huge.or_else(plain).ok_or_else(|| VirError::argument(format!("this host has no pages of {kib} KiB")))
}

/// `NODE_GET_FREE_PAGES`, of the host (-1) and of the one cell that it is shown as: for each of them, for each size.
pub async fn free_pages(call: Call) -> Answered {
    let (sizes, start, count, flags) =
        call.arguments(|r| Ok((r.array(MOST, |r| r.u32())?, r.i32()?, r.u32()?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    if !(-1..=0).contains(&start) {
        return Err(VirError::argument(format!("start cell {start} out of range (0-0)")));
    }
    let memory = whole(&call).await?;
    let of_cell = sizes.iter().map(|kib| free_of(&memory, *kib)).collect::<Result<Vec<_>, _>>()?;
    let cells = (1 - start).unsigned_abs().min(count);
    let counts = of_cell.repeat(cells as usize);
    if counts.len() > MOST {
        return Err(VirError::argument(format!("at most {MOST} counts are answered at once")));
    }
    let mut w = Writer::new();
    w.array(counts, |w, free| {
        w.u64(free);
    });
    Ok(w.finish().into())
}

/// `NODE_GET_MEMORY_PARAMETERS`: how the kernel keeps equal pages once; nothing where it cannot.
pub async fn memory_parameters(call: Call) -> Answered {
    let (wanted, flags) = call.arguments(|r| Ok((r.i32()?, r.u32()?)))?;
    // Strings among them are fine.
    call.known_flags(flags, 4)?;
    let small = |n: u64| Typed::Uint(u32::try_from(n).unwrap_or(u32::MAX));
    let mut all = vec![];
    if let Some(merging) = whole(&call).await?.merging {
        all.extend([
            ("shm_pages_to_scan", small(merging.pages_to_scan)),
            ("shm_sleep_millisecs", small(merging.sleep)),
            ("shm_pages_shared", Typed::Ullong(merging.shared)),
            ("shm_pages_sharing", Typed::Ullong(merging.sharing)),
            ("shm_pages_unshared", Typed::Ullong(merging.unshared)),
            ("shm_pages_volatile", Typed::Ullong(merging.volatile)),
            ("shm_full_scans", Typed::Ullong(merging.full_scans)),
        ]);
        all.extend(merging.across_nodes.map(|is| ("shm_merge_across_nodes", small(is.into()))));
    }
    parameters(all, wanted)
}

/// `NODE_SET_MEMORY_PARAMETERS`
pub async fn set_memory_parameters(call: Call) -> Answered {
    let (all, flags) = call.arguments(|r| Ok((r.array(PARAMETERS, typed)?, r.u32()?)))?;
    call.known_flags(flags, 0)?;
    // From how long a page takes to be written a guest can tell what others have in theirs.
    let why = "pages that are kept once are shared by all guests, which can tell so what others have in memory; the host's \
               administrator decides on that, in /sys/kernel/mm/ksm";
    match all.first() {
        None => Ok(nothing()),
        Some((field, _)) => Err(refuse(field, why)),
    }
}

/// The answer of a statistics call: figures by name and their number; the number alone for who asks for room (`wanted` of 0).
pub(super) fn figures(all: &[(&str, u64)], wanted: i32) -> Answer {
    let shown = if wanted == 0 { vec![] } else { all.to_vec() };
    let mut w = Writer::new();
    w.array(shown, |w, (field, value)| {
        w.string(field).u64(value);
    });
    w.i32(all.len() as i32);
    w.finish().into()
}
