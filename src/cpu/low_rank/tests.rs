use super::super::pool::Pool;
use super::*;

const INPUTS: usize = 37;
const OUTPUTS: usize = 600;
const WEIGHT: usize = 5;

fn numbers(count: usize, seed: usize) -> Vec<f32> {
    let number = |at: usize| ((at * 7919 + seed * 104_729) % 1009) as f32 / 1009.0 - 0.5;
    (0..count).map(number).collect()
}

fn part(first: usize, rank: usize, outputs: usize, seed: usize) -> Part {
    Part {
        first,
        rank,
        outputs,
        down: Aligned::from_slice(&numbers(rank * INPUTS, seed)),
        up: Aligned::from_slice(&numbers(rank * outputs, seed + 1)),
    }
}

/// Adapter 1 changes two parts of the weight, adapter 2 one in another place, adapter 3 another weight.
fn adapters() -> Adapters {
    let one = vec![part(0, 3, 300, 1), part(310, 2, 290, 3)];
    Adapters {
        by_number: HashMap::from([
            (1, HashMap::from([(WEIGHT, one)])),
            (2, HashMap::from([(WEIGHT, vec![part(250, 4, 20, 5)])])),
            (3, HashMap::from([(WEIGHT + 1, vec![part(0, 1, 600, 7)])])),
        ]),
        stride: 5,
        products: Aligned::default(),
    }
}

/// Each sequence's number of tokens and its adapter.
fn step<'a>(
    bounds: &'a [i32],
    numbers: &'a [i32],
    sample_rows: &'a [i32],
    nothing: &'a [i32],
) -> StepInput<'a> {
    StepInput {
        token_ids: nothing,
        positions: nothing,
        places: nothing,
        slots: nothing,
        query_start: bounds,
        context_lens: nothing,
        block_tables: nothing,
        stride: 0,
        window_slots: nothing,
        window_tables: nothing,
        sample_rows,
        next_tokens: nothing,
        state_from: nothing,
        state_to: nothing,
        state_tokens: nothing,
        copied_blocks: nothing,
        adapters: numbers,
    }
}

/// What is added to rows of `x` that follow the step's.
fn added(bounds: &[i32], numbers: &[i32], sampled: &[i32], rows: Rows, x: &mut [f32]) -> Vec<f32> {
    let mut adapters = adapters();
    let step = step(bounds, numbers, sampled, &[]);
    let step = adapters.begin(&step).unwrap();
    let mut y = vec![0.25; x.len() / INPUTS * OUTPUTS];
    let (x, shared) = (SharedSlice::new(x), SharedSlice::new(&mut y));
    let pool = Pool::new(3);
    if let Some(step) = &step {
        pool.run(&|team| {
            // SAFETY: nobody else touches the buffers.
            unsafe {
                let isa = Isa::choose(None).unwrap();
                step.add(team, isa, WEIGHT, rows, (x, INPUTS), (shared, OUTPUTS));
            }
        });
    }
    y
}

fn expected(x: &[f32], adapter: u32) -> Vec<f32> {
    let adapters = adapters();
    let mut y = vec![0.25_f32; OUTPUTS];
    let parts = &adapters.by_number[&adapter];
    for part in parts.get(&WEIGHT).map_or(&[][..], Vec::as_slice) {
        for line in 0..part.rank {
            let down = &part.down[line * INPUTS..(line + 1) * INPUTS];
            let product: f64 = x
                .iter()
                .zip(down)
                .map(|(a, b)| f64::from(*a) * f64::from(*b))
                .sum();
            for output in 0..part.outputs {
                let up = f64::from(part.up[line * part.outputs + output]);
                y[part.first + output] += (product * up) as f32;
            }
        }
    }
    y
}

#[test]
fn each_row_gets_what_its_adapter_adds_and_the_others_nothing() {
    let mut x = numbers(9 * INPUTS, 11);
    let y = added(&[0, 2, 5, 6, 9], &[1, 0, 3, 2], &[], Rows::Tokens, &mut x);
    for (row, adapter) in [1, 1, 0, 0, 0, 3, 2, 2, 2].into_iter().enumerate() {
        let own = &y[row * OUTPUTS..(row + 1) * OUTPUTS];
        if adapter == 0 {
            assert!(own.iter().all(|y| y.to_bits() == 0.25_f32.to_bits()));
            continue;
        }
        let expected = expected(&x[row * INPUTS..(row + 1) * INPUTS], adapter);
        for (at, (y, expected)) in own.iter().zip(&expected).enumerate() {
            assert!((y - expected).abs() < 1e-5, "row {row}, output {at}");
        }
    }
}

#[test]
fn a_row_is_the_same_bits_alone_and_in_any_step() {
    let mut x = numbers(9 * INPUTS, 12);
    let all = added(&[0, 2, 5, 6, 9], &[1, 2, 1, 2], &[], Rows::Tokens, &mut x);
    for (row, adapter) in [1, 1, 2, 2, 2, 1, 2, 2, 2].into_iter().enumerate() {
        let own = &mut x[row * INPUTS..(row + 1) * INPUTS];
        let alone = added(&[0, 1], &[adapter], &[], Rows::Tokens, own);
        let within = &all[row * OUTPUTS..(row + 1) * OUTPUTS];
        assert!(
            alone
                .iter()
                .zip(within)
                .all(|(a, b)| a.to_bits() == b.to_bits())
        );
    }
}

#[test]
fn sampled_rows_have_the_adapters_of_their_sequences() {
    let mut x = numbers(3 * INPUTS, 13);
    let y = added(&[0, 4, 5, 9], &[2, 0, 1], &[3, 4, 8], Rows::Sampled, &mut x);
    for (row, adapter) in [(0, 2), (2, 1)] {
        let expected = expected(&x[row * INPUTS..(row + 1) * INPUTS], adapter);
        let own = &y[row * OUTPUTS..(row + 1) * OUTPUTS];
        assert!(own.iter().zip(&expected).all(|(y, e)| (y - e).abs() < 1e-5));
    }
    assert!(
        y[OUTPUTS..2 * OUTPUTS]
            .iter()
            .all(|y| y.to_bits() == 0.25_f32.to_bits())
    );
}

#[test]
fn a_step_without_adapters_has_nothing_to_add_and_an_unknown_one_is_refused() {
    let mut adapters = adapters();
    let none = step(&[0, 1], &[0], &[], &[]);
    assert!(adapters.begin(&none).unwrap().is_none());
    let unknown = step(&[0, 1], &[7], &[], &[]);
    let error = adapters.begin(&unknown).err().unwrap();
    assert!(error.message.contains("adapter 7 is not loaded"), "{error}");
}

#[test]
fn matrices_that_do_not_fit_a_layer_are_refused() {
    let mut adapters = Adapters::default();
    let shape = LinearShape {
        out: 4,
        cols: 3,
        quantized: false,
    };
    let [down, up] = [[0.5; 6], [0.5; 6]];
    let part = |first, rank, up| LowRank {
        first,
        rank,
        down: &down,
        up,
    };
    adapters.add(1, (0, shape), part(1, 2, &up)).unwrap();
    for (number, part) in [
        (0, part(0, 2, &up[..])),
        (1, part(2, 2, &up[..])),
        (1, part(0, 2, &up[..5])),
        (1, part(0, 1, &up[..])),
        (1, part(0, 0, &up[..])),
    ] {
        let error = adapters.add(number, (0, shape), part).unwrap_err();
        assert!(
            error.message.contains("do not fit a layer [4, 3]"),
            "{error}"
        );
    }
    assert_eq!(adapters.stride, 2);
    adapters.remove(1);
    assert!(adapters.by_number.is_empty());
}
