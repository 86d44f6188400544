//! Memory of this process itself.

use std::ffi::c_int;

/// Gives back what of this program's code and constants is mapped, and what of its heap is free, for a daemon whose start is
/// over: most of its pages were read by the start alone. They stay in the page cache, shared by all processes of the program;
/// what is needed again is mapped again by a fault that reads nothing. What the program has written itself is not touched.
pub fn give_back() {
    extern "C" fn segments(object: *mut libc::dl_phdr_info, _size: usize, _: *mut libc::c_void) -> c_int {
        // SAFETY: dl_iterate_phdr(3) hands a valid object, and its table of headers lives as long as the object.
        let (base, headers) = unsafe {
            let object = &*object;
            let headers = match object.dlpi_phdr.is_null() {
                true => &[],
                false => std::slice::from_raw_parts(object.dlpi_phdr, usize::from(object.dlpi_phnum)),
            };
            (object.dlpi_addr, headers)
        };
        for header in headers.iter().filter(|h| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_W == 0) {
            let (start, end) = whole_pages(base + header.p_vaddr, header.p_memsz);
            // SAFETY: whole pages of a segment that is mapped from the program's file and not writable: each is read from
            // there again with the content that it has. Relocated constants are in a segment that is writable by its header.
            unsafe { libc::madvise(start as *mut libc::c_void, (end - start) as usize, libc::MADV_DONTNEED) };
        }
        // The first object is the program; its libraries are few pages, and of others.
        1
    }
    // SAFETY: the callback keeps to what it is handed; the allocator trims itself under its own lock.
    unsafe {
        libc::dl_iterate_phdr(Some(segments), std::ptr::null_mut());
        libc::malloc_trim(0);
    }
}

/// First byte of the first page, and first byte after the last, that lie within `size` bytes from `start`, which has no other
/// segment on its own first and last page.
fn whole_pages(start: u64, size: u64) -> (u64, u64) {
    let page = rustix::param::page_size() as u64;
    let first = start.next_multiple_of(page);
    (first, ((start + size) / page * page).max(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kilobytes of this process that are mapped from files and stand in memory.
    fn mapped() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find(|l| l.starts_with("RssFile:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Bytes of constants, spread over so many pages that nothing else of this program hides them.
    static CONSTANTS: [u8; 4 << 20] = [7; 4 << 20];

    fn read() -> u64 {
        CONSTANTS.iter().step_by(4096).map(|b| u64::from(std::hint::black_box(*b))).sum()
    }

    #[test]
    fn what_is_given_back_is_there_when_it_is_needed() {
        let sum = read();
        let before = mapped();
        give_back();
        let after = mapped();
        assert!(after + (2 << 10) < before, "{before} kB, then {after} kB");
        assert_eq!(read(), sum);
        assert_eq!(sum, 7 << 10);
    }

    #[test]
    fn only_whole_pages_are_given_back() {
        assert_eq!(whole_pages(0x1000, 0x2000), (0x1000, 0x3000));
        assert_eq!(whole_pages(0x1001, 0x2000), (0x2000, 0x3000));
        assert_eq!(whole_pages(0x1001, 0x10), (0x2000, 0x2000));
    }
}
