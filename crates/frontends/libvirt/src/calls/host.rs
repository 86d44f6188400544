//! Memory of the host.

use super::Answered;
use crate::{
    error::VirError,
    session::{Answer, Call},
    xdr::Writer,
};

/// Total and free, bytes.
async fn memory(call: &Call) -> Result<(u64, u64), VirError> {
    let memory = call.session.front.engine.host_resources(&call.session.context).await?.memory;
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
    let memory = call.session.front.engine.host_resources(&call.session.context).await?.memory;
    let all = [
        ("total", memory.total),
        ("free", memory.free),
        ("buffers", memory.buffers),
        ("cached", memory.cached),
    ]
    .map(|(name, bytes)| (name, bytes / 1024));
    Ok(figures(&all, wanted))
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
